"""Rotary position embedding (RoFormer, Su et al. 2021, equation 34), in the rotate-half layout.

At position n, the pair (x_i, x_{i + d/2}) of a head's d numbers is turned by n theta_i, with theta_i = base^(-2i/d):

    x_i       cos(n theta_i) - x_{i + d/2} sin(n theta_i)
    x_{i+d/2} cos(n theta_i) + x_i         sin(n theta_i)

So the product of a query at m and a key at n depends on m - n alone. Rotate-half pairs the two halves of a head, where
the paper pairs neighbours; a permutation of learned weights tells them apart, and halves are faster to swap.
"""

from dataclasses import dataclass
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
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)  # [head_dim / 2]


@dataclass(frozen=True)
class RotaryExtension:
    """How positions beyond the trained ones are told apart.

    Args:
        method: "linear" squeezes all positions into the trained range (Chen et al. 2023, "Extending Context Window of
            Large Language Models via Positional Interpolation"); "ntk" raises the base, so that high frequencies stay
            as they are and the lowest one is squeezed. ValueError for any other.
        trained_length: positions seen in training; shorter inputs are not changed.
    """

    method: str
    trained_length: int

    def __post_init__(self) -> None:
        if self.method not in ("linear", "ntk"):
            raise ValueError(f"a rotary extension is linear or ntk, got {self.method!r}")

    def frequencies(self, head_dim: int, base: float, length: int) -> Tensor:
        """The inverse frequencies for an input of `length` positions."""
        factor = max(1.0, length / self.trained_length)  # 1 up to the trained length
        if self.method == "linear":
            return inverse_frequencies(head_dim, base) / factor  # position n as if it were n / factor
        # With this power the lowest frequency, i = d / 2 - 1, is divided by the factor, and the highest, i = 0, by one.
        return inverse_frequencies(head_dim, base * factor ** (head_dim / (head_dim - 2)))


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate `[B, N, H, head_dim]` by its positions."""
    # The roll swaps the halves; the minus of the first line above is in the table. [B, N, H, d] * [N, 1, d].
    return torch.addcmul(x * table.cos, x.roll(x.shape[-1] // 2, dims=-1), table.signed_sin)


class RotaryEmbedding(nn.Module):
    """Makes the tables that all blocks of a model share, and keeps the longest one per device and dtype.

    `extension` may be set for inputs longer than those of training; then the tables depend on the length.

    Args:
        head_dim: of each head, even (ValueError).
        base: of the frequencies; the larger, the more slowly the last pairs turn.

    Example:
        >>> rotary = RotaryEmbedding(head_dim=16)
        >>> table = rotary(50, torch.device("cpu"), torch.float32)
        >>> apply_rotary(torch.randn(1, 50, 2, 16), table).shape
        torch.Size([1, 50, 2, 16])
        >>> rotary.extension = RotaryExtension("ntk", trained_length=500)  # for inputs of more than 500 frames
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.extension: RotaryExtension | None = None
        # A plain attribute, no buffer: `model.bfloat16()` would round it.
        self.inverse_frequencies = inverse_frequencies(head_dim, base)
        self._tables: dict[tuple[torch.device, torch.dtype], RotaryTable] = {}

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        """The table of `length` positions, each `[length, 1, head_dim]`."""
        if self.extension is not None and length > self.extension.trained_length:
            frequencies = self.extension.frequencies(self.head_dim, self.base, length)
            return self._build(length, frequencies, device, dtype)
        table = self._tables.get((device, dtype))
        if table is None or len(table.cos) < length:
            table = self._tables[(device, dtype)] = self._build(length, self.inverse_frequencies, device, dtype)
        return RotaryTable(table.cos[:length], table.signed_sin[:length])

    # A table first made while sampling must still serve training: tensors made in inference mode cannot.
    @torch.inference_mode(False)
    def _build(self, length: int, frequencies: Tensor, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        # In single precision whatever the model's: bfloat16 has no number between 256 and 258, nor such an angle.
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # [N, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        # Both halves turn by the same angles.
        cos, signed_sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        # [N, 1, head_dim].
        return RotaryTable(cos.unsqueeze(1).to(device, dtype), signed_sin.unsqueeze(1).to(device, dtype))
