"""Norms that the diffusion time modulates, and the schemes by which it reaches them: AdaLN and its relatives.

In a block, self-attention and feed-forward layer F are wrapped as `x + gate * F(norm(x) * factor + shift)`, where
`[shift, scale, g]` of both come from the time embedding t, `factor = 1 + scale`, `gate = 1 - g`. The schemes differ in
how they make these six parts of width D (EzAudio, Hai et al. 2024, Fig. 2d):

    AdaLN          W_i t                                        6 D^2 weights in every block i
    AdaLN-single   W t + table_i                                6 D^2 once, 6 D in every block
    AdaLN-SOLA     W t + (alpha / r) B_i A_i t + table_i        6 D^2 once, 42 D r + 6 D in every block
    time token     -                                            the time is a token, and nothing is modulated

With A `[6 r, D]` and B `[6 D, 6 r]`. All start at zero: every block begins open, unmodulated, `x + F(norm(x))`.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from foley.nn.feedforward import zero_linear
from foley.nn.norm import LayerNorm, RMSNorm


@dataclass(frozen=True)
class Modulation:
    """Of one layer, each `[B, 1, D]`: `shift` and `factor` act on its normed input, `gate` on its output."""

    shift: Tensor
    factor: Tensor
    gate: Tensor


@dataclass(frozen=True)
class BlockModulation:
    """Of the two modulated layers of a block; None where the scheme does not modulate."""

    self_attention: Modulation | None = None
    feed_forward: Modulation | None = None

    @classmethod
    def from_values(cls, values: Tensor) -> "BlockModulation":
        """Split `[B, 6 D]` into shift, scale and g of self-attention, then of the feed-forward layer."""
        # 1 + scale and 1 - g, so that zeros, from which all schemes start, leave a layer as it is; EzAudio's signs.
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = values.unsqueeze(1).chunk(6, dim=-1)
        return cls(Modulation(shift_a, 1 + scale_a, 1 - gate_a), Modulation(shift_f, 1 + scale_f, 1 - gate_f))


class ModulationScheme(Protocol):
    """Builds `shared: time [B, D] -> [B, 6 D] or None` and `block: (time, shared) -> BlockModulation`."""

    prepends_time_token: ClassVar[bool]

    def build_shared(self, width: int) -> nn.Module | None: ...

    def build_block(self, width: int) -> nn.Module: ...


class BlockProjection(nn.Module):
    """A full projection of the time embedding in every block (DiT, Peebles and Xie 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = zero_linear(width, 6 * width)  # W_i

    def forward(self, time: Tensor, shared: Tensor | None) -> BlockModulation:
        """Of times `[B, D]`; there is nothing shared."""
        return BlockModulation.from_values(self.projection(time))  # W_i t: [B, D] to [B, 6 D]


class BlockTable(nn.Module):
    """A learned table added to the shared projection (PixArt-alpha, Chen et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, width))  # table_i, its rows in the order of `from_values`

    def forward(self, time: Tensor, shared: Tensor) -> BlockModulation:
        """Of the shared projection `[B, 6 D]` alone."""
        return BlockModulation.from_values(_plus_table(shared, self.table))


class BlockLowRank(nn.Module):
    """The shared projection, a low-rank correction of it and a table: `shared + (alpha / r) B A t + table`."""

    def __init__(self, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        # One A for all six parts, of 6 r rows, and one B of 6 D: a part may use the directions found by another.
        self.down = nn.Linear(width, 6 * rank, bias=False)  # A [6 r, D]
        self.up = zero_linear(6 * rank, 6 * width, bias=False)  # B [6 D, 6 r]
        self.table = nn.Parameter(torch.zeros(6, width))  # table_i
        self.scaling = alpha / rank

    def forward(self, time: Tensor, shared: Tensor) -> BlockModulation:
        """Of times `[B, D]` and their shared projection `[B, 6 D]`."""
        low_rank = self.up(self.down(time))  # B A t: [B, D] to [B, 6 r] to [B, 6 D]
        # alpha / r, as in LoRA, keeps the correction's size when the rank changes.
        return BlockModulation.from_values(_plus_table(shared + self.scaling * low_rank, self.table))


def _plus_table(values: Tensor, table: Tensor) -> Tensor:
    """`[B, 6 D]` plus a table `[6, D]`, in the type of the values.

    Under autocast these are in half precision, and the table is not: its float32 would spread to the whole stream.
    """
    return (values + table.flatten()).to(values.dtype)


class NoBlockModulation(nn.Module):
    """For schemes that tell the time otherwise."""

    def forward(self, time: Tensor, shared: Tensor | None) -> BlockModulation:
        return BlockModulation()


@dataclass(frozen=True)
class AdaLN:
    """Every block projects the time embedding by itself."""

    prepends_time_token: ClassVar[bool] = False

    def build_shared(self, width: int) -> nn.Module | None:
        return None

    def build_block(self, width: int) -> nn.Module:
        return BlockProjection(width)


@dataclass(frozen=True)
class AdaLNSingle:
    """One shared projection and a table per block."""

    prepends_time_token: ClassVar[bool] = False

    def build_shared(self, width: int) -> nn.Module | None:
        return zero_linear(width, 6 * width)  # W, one for all blocks

    def build_block(self, width: int) -> nn.Module:
        return BlockTable(width)


@dataclass(frozen=True)
class AdaLNSola:
    """One shared projection, and per block a low-rank correction and a table (EzAudio, Section II-B).

    "AdaLN-single orchestrated by low-rank adjustment": nearly as few weights as AdaLN-single, and as stable as AdaLN.

    Args:
        rank: r of each of the six correction parts.
        alpha: the correction is scaled by `alpha / rank`.

    Example:
        >>> scheme = AdaLNSola(rank=4, alpha=4)
        >>> shared, block = scheme.build_shared(32), scheme.build_block(32)  # one for the model, one for each block
        >>> time = torch.randn(2, 32)
        >>> block(time, shared(time)).self_attention.gate.shape
        torch.Size([2, 1, 32])
    """

    rank: int
    alpha: float
    prepends_time_token: ClassVar[bool] = False

    def build_shared(self, width: int) -> nn.Module | None:
        return zero_linear(width, 6 * width)  # W, one for all blocks

    def build_block(self, width: int) -> nn.Module:
        return BlockLowRank(width, self.rank, self.alpha)


@dataclass(frozen=True)
class TimeToken:
    """No modulation: the time embedding is the first token of the sequence (Stable Audio, Evans et al. 2024)."""

    prepends_time_token: ClassVar[bool] = True

    def build_shared(self, width: int) -> nn.Module | None:
        return None

    def build_block(self, width: int) -> nn.Module:
        return NoBlockModulation()


class ModulatedNorm(LayerNorm):
    """Layer norm: `norm(x) * factor + shift`, or the plain norm where there is no modulation."""

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return _modulate(super().forward(x), modulation)


class ModulatedRMSNorm(RMSNorm):
    """The same around RMSNorm."""

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return _modulate(super().forward(x), modulation)


def _modulate(normed: Tensor, modulation: Modulation | None) -> Tensor:
    # [B, N, D] * [B, 1, D] + [B, 1, D], in one pass over the tokens
    return normed if modulation is None else torch.addcmul(modulation.shift, normed, modulation.factor)
