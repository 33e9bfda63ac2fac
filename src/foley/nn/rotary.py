"""Rotary position embedding (RoFormer, Su et al. 2021, equation 34), in the rotate-half layout."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class RotaryTable(NamedTuple):
    """Cosines and sines `[N, 1, head_dim]`; the sines of the first half carry rotate-half's minus sign."""

    cos: Tensor
    signed_sin: Tensor


def inverse_frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """`base^(-2i / head_dim)` for i below `head_dim / 2`; raises ValueError for an odd dimension."""
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head dimension, got {head_dim}; change width or num_heads")
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate `[B, N, H, head_dim]` by its positions."""
    return torch.addcmul(x * table.cos, x.roll(x.shape[-1] // 2, dims=-1), table.signed_sin)


class RotaryEmbedding(nn.Module):
    """Makes the tables that all blocks of a model share, and keeps the longest one per device and dtype."""

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.inverse_frequencies = inverse_frequencies(head_dim, base)
        self._tables: dict[tuple[torch.device, torch.dtype], RotaryTable] = {}

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        """The table of `length` positions, each `[length, 1, head_dim]`."""
        table = self._tables.get((device, dtype))
        if table is None or len(table.cos) < length:
            table = self._tables[(device, dtype)] = self._build(length, device, dtype)
        return RotaryTable(table.cos[:length], table.signed_sin[:length])

    # A table first made while sampling must still serve training: tensors made in inference mode cannot.
    @torch.inference_mode(False)
    def _build(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self.inverse_frequencies)
        cos, sin = angles.cos(), angles.sin()
        cos, signed_sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return RotaryTable(cos.unsqueeze(1).to(device, dtype), signed_sin.unsqueeze(1).to(device, dtype))
