"""Norms that keep the stream in the type it comes in, so that mixed precision stays half precision between layers.

Autocast on CUDA computes a norm in float32 and returns float32, and everything elementwise after it, from modulation to
residual sum, would move twice the bytes and hand float32 queries and keys to attention. The kernels here sum in float32
whatever they are given; only what they read and write is of the stream's type.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Where what is computed of `x` keeps its types; on the meta device, which knows no autocast, everywhere."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, whose output has the type of its input under autocast too.

    >>> norm = LayerNorm(8)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     norm(torch.randn(2, 8).bfloat16()).dtype, norm(torch.randn(2, 8)).dtype
    (torch.bfloat16, torch.float32)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        with without_autocast(x):
            # CUDA's kernel wants the weights in the type of its input.
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.RMSNorm):
    """The same of `torch.nn.RMSNorm` (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)  # LLaMA's; given, since PyTorch's default depends on the type

    def forward(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        with without_autocast(x):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
