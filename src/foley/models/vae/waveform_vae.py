"""The waveform VAE: what turns audio into the latents that diffusion works on, and back."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from foley.models.vae.base import AudioVAE
from foley.models.vae.decoder import Decoder
from foley.models.vae.encoder import Encoder
from foley.nn.conv import fold_weight_norm

_INITIAL_SCALE = -5.0  # before the softplus: a standard deviation of 0.007


class WaveformVAE(AudioVAE):
    """Fully convolutional VAE on mono waveforms (EzAudio section II-A; the Stable Audio / DAC family).

    Args:
        channels: width at the audio rate.
        multipliers: width after each stage, in units of `channels`.
        strides: down-sampling of each stage, even; their product is the hop.
        latent_channels: C.
        sample_rate_hz: rate of the audio.
        num_units: residual units of each stage (dilations 1, 3, 9); fewer at the audio rate make a codec cheap.

    Raises:
        ValueError: where the stages disagree in number, or a stride is odd.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (2, 4, 6, 10),
        latent_channels: int = 128,
        sample_rate_hz: int = 24000,
        num_units: Sequence[int] = (3, 3, 3, 3),
    ) -> None:
        super().__init__()
        if not len(multipliers) == len(strides) == len(num_units):
            raise ValueError(
                f"multipliers {list(multipliers)}, strides {list(strides)} and num_units {list(num_units)} "
                "must have one entry for each stage"
            )
        widths = [channels, *(channels * multiplier for multiplier in multipliers)]
        self.strides = tuple(strides)
        self.latent_channels = latent_channels
        self.sample_rate_hz = sample_rate_hz
        self.encoder = Encoder(widths, strides, num_units, 2 * latent_channels)
        self.decoder = Decoder(latent_channels, widths, strides, num_units)
        self._start_narrow()

    def _start_narrow(self) -> None:
        """Give the posterior little noise at first: from a wide one the decoder learns no waveform for a long time."""
        if self.encoder.head.bias is not None:
            nn.init.constant_(self.encoder.head.bias[self.latent_channels :], _INITIAL_SCALE)

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return prod(self.strides)

    @property
    def context_frames(self) -> int:
        """See `AudioVAE.context_frames`."""
        return self.decoder.context_frames

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`."""
        mean, scale = self.encoder(self._whole_frames(audio)).float().chunk(2, dim=1)
        return mean, scale

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to audio `[B, 1, L * hop]`; not clipped."""
        return self.decoder(latent)

    def fold_weight_norm(self) -> "WaveformVAE":
        """Fold the weight norm for inference, in place; afterwards the state dict no longer fits the config."""
        fold_weight_norm(self)
        return self
