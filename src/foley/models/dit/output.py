"""The last layer of the denoiser."""

import torch
from torch import Tensor, nn

from foley.nn.adaln import Modulation
from foley.nn.linear import xavier_linear, zero_linear
from foley.nn.norm import ModulatedNorm, ModulatedRMSNorm


class OutputLayer(nn.Module):
    """Modulated norm, linear to the latent channels and a convolution over time that starts at zero.

    Args:
        width: D.
        latent_channels: C.
        modulated: shift and scale by the time embedding.
        norm: its kind.
    """

    def __init__(
        self,
        width: int,
        latent_channels: int,
        modulated: bool,
        norm: type[ModulatedNorm] | type[ModulatedRMSNorm] = ModulatedNorm,
    ) -> None:
        super().__init__()
        self.norm = norm(width)
        self.modulation = zero_linear(width, 2 * width) if modulated else None
        self.linear = xavier_linear(width, latent_channels)
        self.conv = nn.Conv1d(latent_channels, latent_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def modulate(self, time: Tensor) -> Modulation | None:
        """Shift and scale for times `[B, D]`; None where the time does not modulate."""
        if self.modulation is None:
            return None
        shift, scale = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        return Modulation(shift, 1 + scale, gate=torch.ones_like(scale))

    def forward(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        """Tokens `[B, L, D]` to a latent `[B, C, L]`."""
        latent = self.linear(self.norm(x, modulation))
        return self.conv(latent.transpose(1, 2))
