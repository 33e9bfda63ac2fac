"""A waveform VAE that does its work at the frame rate: spectra in, spectra out, all of it differentiable."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from foley.models.vae.base import AudioVAE
from foley.nn.convnext import ConvNeXtBlock, convnext
from foley.nn.stft import FramedSTFT

_COMPRESSION = 0.3  # of magnitudes, towards how loud they sound
_SMALLEST_MAGNITUDE = 1e-5
_LARGEST_LOG_MAGNITUDE = 5.0
_QUIET = -4.0  # log magnitude that training starts from
_INITIAL_SCALE = -5.0  # before the softplus: a standard deviation of 0.007


class SpectralEncoder(nn.Module):
    """Audio to the raw moments of the latent, through compressed complex spectra."""

    def __init__(self, stft: FramedSTFT, width: int, num_blocks: Sequence[int], pool: int, out_channels: int) -> None:
        super().__init__()
        self.stft = stft
        self.stem = nn.Linear(3 * stft.bins, width)
        self.fine = convnext(width, num_blocks[0])
        self.pool = nn.Linear(pool * width, width)
        self.coarse = convnext(width, num_blocks[1])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_channels)

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, T]` to `[B, L, out_channels]`."""
        fine = self.fine(self.stem(_features(self.stft(audio))))
        return self.head(self.norm(self.coarse(self.pool(fine.unflatten(1, (-1, self._pool)).flatten(2)))))

    @property
    def _pool(self) -> int:
        return self.pool.in_features // self.pool.out_features


class SpectralDecoder(nn.Module):
    """Latent to audio, through the magnitude and the phase of each bin."""

    def __init__(self, stft: FramedSTFT, width: int, num_blocks: Sequence[int], pool: int, in_channels: int) -> None:
        super().__init__()
        self.stft = stft
        self.stem = nn.Linear(in_channels, width)
        self.coarse = convnext(width, num_blocks[1])
        self.unpool = nn.Linear(width, pool * width)
        self.fine = convnext(width, num_blocks[0])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * stft.bins)
        nn.init.constant_(self.head.bias[: stft.bins], _QUIET)

    def forward(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, 1, L * hop]`."""
        coarse = self.unpool(self.coarse(self.stem(latent.transpose(1, 2))))
        fine = self.fine(coarse.unflatten(2, (-1, self.stem.out_features)).flatten(1, 2))
        log_magnitude, real, imaginary = self.head(self.norm(fine)).float().chunk(3, dim=-1)
        magnitude = log_magnitude.clamp(max=_LARGEST_LOG_MAGNITUDE).exp()
        # A direction rather than an angle: no jump where the phase wraps.
        length = torch.rsqrt(real.square() + imaginary.square() + _SMALLEST_MAGNITUDE) * magnitude
        return self.stft.inverse(torch.complex(real * length, imaginary * length))[:, None]

    @property
    def context_frames(self) -> int:
        """How many latent frames before a frame, and after it, its audio hears."""
        pool = self.unpool.out_features // self.unpool.in_features
        fine = self.stft.window_samples // self.stft.hop_samples + _reach(self.fine)
        return -(-fine // pool) + _reach(self.coarse)


class SpectralVAE(AudioVAE):
    """VAE on mono waveforms with a short-time Fourier transform at both ends (after Siuzdak 2023, Vocos).

    What a waveform decoder spends at the audio rate, this one spends on frames: a hundred rather than 24,000 for each
    second, so that a codec of some use can be trained on a CPU. The spectra keep the phase, so latents may too.

    Args:
        width: D of the blocks.
        window_samples: of the transform.
        frame_samples: between spectra.
        pool: spectra for each latent frame.
        latent_channels: C.
        sample_rate_hz: rate of the audio.
        encoder_blocks, decoder_blocks: how many at the rate of the spectra, and at that of the latent.
    """

    def __init__(
        self,
        width: int = 256,
        window_samples: int = 960,
        frame_samples: int = 240,
        pool: int = 2,
        latent_channels: int = 32,
        sample_rate_hz: int = 24000,
        encoder_blocks: Sequence[int] = (2, 2),
        decoder_blocks: Sequence[int] = (5, 3),
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.sample_rate_hz = sample_rate_hz
        self._hop_samples = frame_samples * pool
        stft = FramedSTFT(window_samples, frame_samples)
        self.encoder = SpectralEncoder(stft, width, encoder_blocks, pool, 2 * latent_channels)
        self.decoder = SpectralDecoder(stft, width, decoder_blocks, pool, latent_channels)
        nn.init.constant_(self.encoder.head.bias[latent_channels:], _INITIAL_SCALE)

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return self._hop_samples

    @property
    def context_frames(self) -> int:
        """See `AudioVAE.context_frames`."""
        return self.decoder.context_frames

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`."""
        mean, scale = self.encoder(self._whole_frames(audio)[:, 0]).transpose(1, 2).float().chunk(2, dim=1)
        return mean, scale

    def decode(self, latent: Tensor) -> Tensor:
        """See `AudioVAE.decode`."""
        return self.decoder(latent)


def _features(spectra: Tensor) -> Tensor:
    """Complex `[B, N, bins]` to `[B, N, 3 * bins]`: log magnitude, and both parts with the magnitude compressed."""
    magnitude = spectra.abs().clamp(min=_SMALLEST_MAGNITUDE)
    parts = torch.view_as_real(spectra * magnitude.pow(_COMPRESSION - 1))
    return torch.cat([magnitude.log() / 5, parts[..., 0], parts[..., 1]], dim=-1)


def _reach(blocks: nn.Sequential) -> int:
    return sum(cast(ConvNeXtBlock, block).reach for block in blocks)
