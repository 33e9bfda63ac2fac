"""Layer normalisation whose output time may shift and scale."""

import torch
from torch import Tensor, nn

from foley.nn.adaln import Modulation


class ModulatedNorm(nn.LayerNorm):
    """`norm(x) * factor + shift`; the plain norm where there is no modulation."""

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        normed = super().forward(x)
        if modulation is None:
            return normed
        return torch.addcmul(modulation.shift, normed, modulation.factor)
