"""The Gaussian bottleneck of the VAE."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

_SMALLEST_STD = 1e-4


@dataclass(frozen=True)
class GaussianPosterior:
    """A diagonal Gaussian over latents: `mean` and `std`, each `[B, C, L]`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_moments(cls, mean: Tensor, scale: Tensor) -> "GaussianPosterior":
        """From the encoder's raw output: `std = softplus(scale) + 1e-4` (Stable Audio)."""
        return cls(mean, softplus(scale) + _SMALLEST_STD)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One reparameterised draw `[B, C, L]`; the noise is drawn where the generator lives, then moved."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return torch.addcmul(self.mean, self.std, noise.to(self.mean))

    def kl(self) -> Tensor:
        """`sum_c(mean^2 + var - log var - 1)`, averaged over batch and frames: twice the divergence from N(0, 1)."""
        variance = self.std.square()
        return (self.mean.square() + variance - variance.log() - 1).sum(1).mean()
