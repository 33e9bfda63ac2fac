"""The codec of Stable Audio Open by diffusers' own model, as a codec whose latents our denoisers are trained on.

    audio [B, A, T] -> encoder -> mean and scale, each [B, C, L] -> decoder -> audio [B, A, L * hop]

Evans et al. 2024, "Stable Audio Open", section 3.1: A = 2, 44.1 kHz, a hop of 2048 samples, C = 64. Ours of the same
family is `foley.models.codec.waveform_vae`.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from foley.models.codec.base import AudioVAE
from foley.models.codec.waveform_vae import heard_frames


class OobleckCodec(AudioVAE):
    """`AutoencoderOobleck`, frozen or trained as any other codec; its posterior is the Gaussian of `AudioVAE`.

    Args:
        encoder_hidden_size, downsampling_ratios, channel_multiples, decoder_channels: of diffusers' model.
        latent_channels: C, its `decoder_input_channels`: half of the first, which is how wide its encoder ends.
        audio_channels: A.
        sample_rate_hz: of the audio, its `sampling_rate`.

    Raises:
        ValueError: for other latent channels, and for odd ratios, with which the model makes too few samples.

    Example:
        >>> import torch
        >>> sizes = {"encoder_hidden_size": 6, "channel_multiples": (1, 2), "decoder_channels": 4}
        >>> codec = OobleckCodec(**sizes, downsampling_ratios=(2, 4), latent_channels=3)
        >>> latent = codec.encode(torch.randn(1, 2, 801))
        >>> latent.shape, codec.decode(latent).shape  # the last frame of 8 samples is filled up with silence
        (torch.Size([1, 3, 101]), torch.Size([1, 2, 808]))
    """

    def __init__(
        self,
        encoder_hidden_size: int = 128,
        downsampling_ratios: Sequence[int] = (2, 4, 4, 8, 8),
        channel_multiples: Sequence[int] = (1, 2, 4, 8, 16),
        decoder_channels: int = 128,
        latent_channels: int = 64,
        audio_channels: int = 2,
        sample_rate_hz: int = 44100,
    ) -> None:
        super().__init__()
        if encoder_hidden_size != 2 * latent_channels:  # mean and scale
            raise ValueError(
                f"encoder_hidden_size={encoder_hidden_size}: this model's encoder ends as wide as that, which must be "
                f"twice latent_channels={latent_channels}"
            )
        if any(ratio % 2 for ratio in downsampling_ratios):
            raise ValueError(
                f"downsampling_ratios={list(downsampling_ratios)}: this model's decoder makes whole frames of even ones"
            )
        from diffusers import AutoencoderOobleck  # slow to import, and of no use to other codecs

        self.published: Any = AutoencoderOobleck(
            encoder_hidden_size,
            list(downsampling_ratios),
            list(channel_multiples),
            decoder_channels,
            latent_channels,
            audio_channels,
            sample_rate_hz,
        )
        self.latent_channels, self.audio_channels = latent_channels, audio_channels
        self.sample_rate_hz = sample_rate_hz
        self._hop_samples = prod(downsampling_ratios)  # 2 * 4 * 4 * 8 * 8 as published

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame: 2048 as published."""
        return self._hop_samples

    @property
    def context_frames(self) -> int:
        """See `AudioVAE.context_frames`."""
        return heard_frames(self.published.decoder)

    def freeze_encoder(self) -> None:
        """See `AudioVAE.freeze_encoder`."""
        self.published.encoder.requires_grad_(False)

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`."""
        # [B, 2 C, L]; the published posterior makes a deviation of the scale as `GaussianPosterior` does.
        mean, scale = self.published.encoder(self._whole_frames(audio)).float().chunk(2, dim=1)
        return mean, scale

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to audio `[B, A, L * hop]`; not clipped."""
        # Strides are even, so each stage multiplies the length exactly: nothing to pad or to cut.
        audio: Tensor = self.published.decoder(latent)
        return audio
