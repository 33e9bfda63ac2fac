"""The 1-D VAE on mel spectrograms: what AudioLCM's diffusion works on."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from foley.models.mel_codec.autoencoder import MelDecoder, MelEncoder
from foley.models.mel_codec.spectrogram import MelSpectrogram
from foley.models.vae.bottleneck import GaussianPosterior

_INITIAL_SCALE = -5.0  # before the softplus: a standard deviation of 0.007


class MelVAE(nn.Module):
    """VAE whose channels are mel bands and whose only axis is time (Huang et al. 2023, Make-An-Audio 2).

    Args:
        spectrogram: the mel spectrogram it is for.
        channels: width of the first stage.
        multipliers: width of each stage, in units of `channels`.
        strides: 1 or 2 for each stage; their product is the number of mel frames for each latent frame.
        num_blocks: residual blocks of each stage.
        latent_channels: C.
        kernel: frames that a convolution sees, odd.
        norm_groups: groups of the group norms; divides every width.

    Raises:
        ValueError: where the stages disagree in number, or a stride is neither 1 nor 2.
    """

    def __init__(
        self,
        spectrogram: MelSpectrogram,
        channels: int = 384,
        multipliers: Sequence[int] = (1, 2, 4),
        strides: Sequence[int] = (2, 1, 1),
        num_blocks: int = 2,
        latent_channels: int = 20,
        kernel: int = 5,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(multipliers) != len(strides) or not set(strides) <= {1, 2}:
            raise ValueError(
                f"multipliers {list(multipliers)} and strides {list(strides)} must have one entry for each stage, "
                "and strides must be 1 or 2"
            )
        self.spectrogram = spectrogram
        self.latent_channels = latent_channels
        self.frames_per_latent = prod(strides)
        mel_bands, widths = spectrogram.mel_bands, [channels * multiplier for multiplier in multipliers]
        self.encoder = MelEncoder(mel_bands, widths, strides, num_blocks, 2 * latent_channels, kernel, norm_groups)
        self.decoder = MelDecoder(latent_channels, mel_bands, widths, strides, num_blocks, kernel, norm_groups)
        # Little noise at first, as in the waveform VAE.
        nn.init.constant_(self.encoder[-1].bias[latent_channels:], _INITIAL_SCALE)  # type: ignore[index]

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return self.spectrogram.hop_samples * self.frames_per_latent

    def encode_moments(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, mel_bands, F]`, F a multiple of `frames_per_latent`, to the raw (mean, scale), each `[B, C, L]`."""
        mean, scale = self.encoder(mel).float().chunk(2, dim=1)
        return mean, scale

    def posterior(self, mel: Tensor) -> GaussianPosterior:
        """The distribution of the latent given `mel` `[B, mel_bands, F]`."""
        return GaussianPosterior.from_moments(*self.encode_moments(mel))

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, mel_bands, L * frames_per_latent]`."""
        return self.decoder(latent)
