"""Norms that the diffusion time modulates, and the schemes by which it reaches them: AdaLN and its relatives."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from foley.nn.feedforward import zero_linear


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
        self.projection = zero_linear(width, 6 * width)

    def forward(self, time: Tensor, shared: Tensor | None) -> BlockModulation:
        return BlockModulation.from_values(self.projection(time))


class BlockTable(nn.Module):
    """A learned table added to the shared projection (PixArt-alpha, Chen et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, time: Tensor, shared: Tensor) -> BlockModulation:
        return BlockModulation.from_values(shared + self.table.flatten())


class BlockLowRank(nn.Module):
    """The shared projection, a low-rank correction of it and a table: `shared + (alpha / r) B A t + table`."""

    def __init__(self, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, 6 * rank, bias=False)
        self.up = zero_linear(6 * rank, 6 * width, bias=False)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.scaling = alpha / rank

    def forward(self, time: Tensor, shared: Tensor) -> BlockModulation:
        low_rank = self.up(self.down(time))
        return BlockModulation.from_values(shared + self.scaling * low_rank + self.table.flatten())


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
        return zero_linear(width, 6 * width)

    def build_block(self, width: int) -> nn.Module:
        return BlockTable(width)


@dataclass(frozen=True)
class AdaLNSola:
    """One shared projection, and per block a low-rank correction and a table (EzAudio, Section 3.2).

    Args:
        rank: r of each of the six correction parts.
        alpha: the correction is scaled by `alpha / rank`.
    """

    rank: int
    alpha: float
    prepends_time_token: ClassVar[bool] = False

    def build_shared(self, width: int) -> nn.Module | None:
        return zero_linear(width, 6 * width)

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


_RMS_EPSILON = 1e-5


class ModulatedNorm(nn.LayerNorm):
    """Layer norm: `norm(x) * factor + shift`, or the plain norm where there is no modulation."""

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return _modulate(super().forward(x), modulation)


class ModulatedRMSNorm(nn.RMSNorm):
    """The same around RMSNorm (Zhang and Sennrich 2019, equation 4), with the epsilon of LLaMA."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_RMS_EPSILON)

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return _modulate(super().forward(x), modulation)


def _modulate(normed: Tensor, modulation: Modulation | None) -> Tensor:
    return normed if modulation is None else torch.addcmul(modulation.shift, normed, modulation.factor)
