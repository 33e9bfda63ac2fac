"""Normalisation whose output time may shift and scale."""

import torch
from torch import Tensor, nn

from foley.nn.adaln import Modulation

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
