"""ConvNeXt blocks over time: wide kernels for each channel, then a feed-forward over channels."""

import torch
from torch import Tensor, nn

_KERNEL = 7
_EXPANSION = 3
_BRANCH_SCALE = 0.3  # blocks start near the identity


class ConvNeXtBlock(nn.Module):
    """`x + scale * mlp(norm(depthwise(x)))` over rows (Liu et al. 2022; over time as in Siuzdak 2023, Vocos)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, _EXPANSION * width), nn.GELU(), nn.Linear(_EXPANSION * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), _BRANCH_SCALE))

    def forward(self, rows: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        mixed = self.depthwise(rows.transpose(1, 2)).transpose(1, 2)
        return rows + self.scale * self.layers(self.norm(mixed))

    @property
    def reach(self) -> int:
        """Rows before and after a row that its output depends on."""
        return _KERNEL // 2


def convnext(width: int, count: int) -> nn.Sequential:
    """`count` blocks in a row."""
    return nn.Sequential(*(ConvNeXtBlock(width) for _ in range(count)))
