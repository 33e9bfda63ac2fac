"""A VAE that does its work at the frame rate: magnitudes of spectra in and out, phases searched or learnt.

The way in and the way out:

    audio [B, 1, T]  -> log magnitudes [B, L * pool, bins] -> blocks -> `pool` frames to one -> blocks -> moments
    latent [B, C, L] -> blocks -> one frame to `pool` -> blocks -> log magnitudes m                  -> Griffin-Lim
                                                                or log magnitudes m and directions d -> inverse STFT

Learnt phases are those of Vocos (Siuzdak 2023, section 3.2): the spectrum is exp(m) d / |d|, with d a complex number
for each bin in the place of the paper's cosine and sine of an angle.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from foley.models.codec.base import INITIAL_SCALE, AudioVAE, GaussianPosterior
from foley.nn.conv import ConvNeXtBlock, convnext
from foley.nn.norm import without_autocast
from foley.nn.stft import FramedSTFT

_LOG_CENTRE, _LOG_SPREAD = -5.0, 3.0  # of the log magnitudes of sounds, roughly
_SILENCE_MARGIN = 1.5  # in floors: guesses at silence scatter around the floor
_SMOOTH, _ROUGH = 50.0, 0.7  # deviations of cepstral coefficients: 50 / (1 + k) of sounds, and what is always noise
_LEAST_DIRECTION = 1e-6  # of |d|^2: no division by zero


class Spectrum(nn.Module):
    """Log magnitudes to about unit spread, and back."""

    def forward(self, spectra: Tensor) -> Tensor:
        """`[..., bins]` to `[..., bins]`."""
        return (spectra - _LOG_CENTRE) / _LOG_SPREAD

    def inverse(self, scaled: Tensor) -> Tensor:
        """`[..., bins]` to `[..., bins]`."""
        return scaled * _LOG_SPREAD + _LOG_CENTRE


class Cepstrum(Spectrum):
    """Log magnitudes to the coefficients of their cosine transform, each about as large as the others, and back.

    Of log magnitudes most of the variance is the level and the tilt, very little a harmonic. A network that is given
    them, and a latent that it learns, hold about a dozen directions; of cepstra they hold more.
    """

    basis: Tensor
    scales: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        order = torch.arange(bins, dtype=torch.float64)
        # The orthonormal cosine transform of the second kind, a coefficient a row.
        basis = (torch.pi / bins * order[:, None] * (order + 0.5)).cos() * (2 / bins) ** 0.5
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis.float(), persistent=False)  # [bins, bins]
        self.register_buffer("scales", (_SMOOTH / (1 + order) + _ROUGH).float(), persistent=False)  # [bins]

    def forward(self, spectra: Tensor) -> Tensor:
        """`[..., bins]` to `[..., bins]`."""
        return (spectra - _LOG_CENTRE) @ self.basis.T / self.scales

    def inverse(self, scaled: Tensor) -> Tensor:
        """`[..., bins]` to `[..., bins]`."""
        return (scaled * self.scales) @ self.basis + _LOG_CENTRE


class SpectralEncoder(nn.Module):
    """Log magnitudes to the raw moments of the latent: blocks at the rate of the spectra, then at the latent's.

    Args:
        scaling: what its blocks see of log magnitudes.
    """

    def __init__(
        self, scaling: Spectrum, bins: int, width: int, num_blocks: Sequence[int], pool: int, out_channels: int
    ) -> None:
        super().__init__()
        self.scaling, self.pool = scaling, pool
        self.stem = nn.Linear(bins, width)
        self.fine = convnext(width, num_blocks[0])
        self.down = nn.Linear(pool * width, width)  # of `pool` neighbours at once
        self.coarse = convnext(width, num_blocks[1])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_channels)

    def forward(self, spectra: Tensor) -> Tensor:
        """`[B, L * pool, bins]` to `[B, L, out_channels]`."""
        with without_autocast(spectra):  # a harmonic is less than what half precision rounds off a level
            stem = self.stem(self.scaling(spectra))
        fine = self.fine(stem)  # [B, L * pool, D]
        joined = fine.unflatten(1, (-1, self.pool)).flatten(2)  # [B, L, pool * D]: nothing is averaged away
        coarse = self.norm(self.coarse(self.down(joined).float()))
        with without_autocast(coarse):
            return self.head(coarse)


class SpectralDecoder(nn.Module):
    """Latent to log magnitudes, the mirror of the encoder.

    Args:
        scaling: what its blocks make, brought back to log magnitudes.
        has_directions: beside each magnitude gives the two parts of a direction.
    """

    def __init__(
        self,
        scaling: Spectrum,
        bins: int,
        width: int,
        num_blocks: Sequence[int],
        pool: int,
        in_channels: int,
        has_directions: bool = False,
    ) -> None:
        super().__init__()
        self.scaling, self.pool, self.bins = scaling, pool, bins
        self.stem = nn.Linear(in_channels, width)
        self.coarse = convnext(width, num_blocks[1])
        self.up = nn.Linear(width, pool * width)
        self.fine = convnext(width, num_blocks[0])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * bins if has_directions else bins)

    def forward(self, rows: Tensor) -> Tensor:
        """`[B, L, C]` to `[B, L * pool, bins]`, or `[B, L * pool, 3 bins]`: magnitudes, then both parts of all d."""
        coarse = self.coarse(self.stem(rows).float())  # [B, L, D]
        fine = self.up(coarse).float().unflatten(2, (self.pool, -1)).flatten(1, 2)  # [B, L * pool, D]
        fine = self.norm(self.fine(fine))
        with without_autocast(fine):
            spectra = self.head(fine)
            magnitudes = self.scaling.inverse(spectra[..., : self.bins])
        directions = spectra[..., self.bins :]
        return torch.cat([magnitudes, directions], dim=-1) if directions.shape[-1] else magnitudes

    @property
    def reach_frames(self) -> int:
        """How many latent frames before a frame, and after it, its spectra hear."""
        return -(-_reach(self.fine) // self.pool) + _reach(self.coarse)  # fine frames count as a pool-th, rounded up


class SpectralVAE(AudioVAE):
    """VAE on the magnitudes of short-time spectra (blocks after Vocos, Siuzdak 2023); phases are found or learnt.

    What a waveform VAE spends at the audio rate, this one spends on frames, a hundred rather than 24,000 for each
    second: on a CPU it learns more in minutes than the other in hours. It hears nothing of phases and keeps none; those
    that it learns are of a sound with these magnitudes, not of the original.

    Args:
        width: D of the blocks.
        window_samples: of the transform.
        frame_samples: between spectra.
        pool: spectra for each latent frame.
        latent_channels: C.
        sample_rate_hz: rate of the audio.
        encoder_blocks, decoder_blocks: how many at the rate of the spectra, and at that of the latent.
        floor: smallest magnitude told apart from silence, in the orthonormal transform.
        phase_iterations: of Griffin-Lim, when decoding.
        learns_phases: the decoder makes them, and is trained on audio (`foley.training.codecs.CodecTraining`). What is
            silent is then its own decision, too.
        cepstral: the blocks see cepstra in the place of log magnitudes, see `Cepstrum`.

    Example:
        >>> import torch
        >>> codec = SpectralVAE(width=32, latent_channels=4)
        >>> latent = codec.encode(torch.randn(1, 1, 4800))
        >>> latent.shape, codec.decode(latent).shape  # a hop of 2 * 240 samples
        (torch.Size([1, 4, 10]), torch.Size([1, 1, 4800]))
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
        decoder_blocks: Sequence[int] = (4, 3),
        floor: float = 3e-4,
        phase_iterations: int = 16,
        learns_phases: bool = False,
        cepstral: bool = False,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.sample_rate_hz = sample_rate_hz
        self.floor = floor
        self.phase_iterations = phase_iterations
        self.learns_phases = learns_phases
        self._hop_samples = frame_samples * pool
        self.stft = FramedSTFT(window_samples, frame_samples)
        # The encoder gives mean and scale, 2 C channels.
        scaling = Cepstrum(self.stft.bins) if cepstral else Spectrum()
        shape = scaling, self.stft.bins, width
        self.encoder = SpectralEncoder(*shape, encoder_blocks, pool, 2 * latent_channels)
        self.decoder = SpectralDecoder(*shape, decoder_blocks, pool, latent_channels, learns_phases)
        # Of the scales, which follow the means.
        nn.init.constant_(self.encoder.head.bias[latent_channels:], INITIAL_SCALE)

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return self._hop_samples

    def spectra(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` to log magnitudes `[B, L * pool, bins]`, those below the floor raised to it."""
        # [B, T] to [B, L * pool, bins].
        return self.stft(self._whole_frames(audio)[:, 0]).abs().clamp(min=self.floor).log()

    def spectral_posterior(self, spectra: Tensor) -> GaussianPosterior:
        """The distribution of the latent given log magnitudes `[B, L * pool, bins]`."""
        return GaussianPosterior.from_moments(*self._moments(spectra))

    @property
    def context_frames(self) -> int | None:
        """See `AudioVAE.context_frames`; Griffin-Lim hears all there is."""
        if not self.learns_phases:
            return None
        half_windows = self.stft.window_samples // 2
        return self.decoder.reach_frames + -(-half_windows // self.hop_samples)  # rounded up

    def decode_spectra(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to log magnitudes `[B, L * pool, bins]`; with learnt phases and their directions, 3 bins."""
        return self.decoder(latent.transpose(1, 2)).float()

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`."""
        return self._moments(self.spectra(audio))

    def decode(self, latent: Tensor) -> Tensor:
        """See `AudioVAE.decode`."""
        return self.phase(self.decode_spectra(latent))

    def phase(self, spectra: Tensor) -> Tensor:
        """What `decode_spectra` gives, `[B, L * pool, bins or 3 bins]`, to audio `[B, 1, L * hop]`.

        Nothing is louder than a sinusoid at full scale: where a latent is no codec's, a guided or distilled one, the
        exponential would make a thud of a small overshoot. Where phases are searched, what lies near the floor is
        silent.
        """
        if self.learns_phases:
            magnitude, real, imaginary = spectra.chunk(3, dim=-1)
            magnitude = magnitude.exp().clamp(max=self.stft.full_scale)
            scale = magnitude * (real.square() + imaginary.square() + _LEAST_DIRECTION).rsqrt()  # exp(m) / |d|
            return self.stft.inverse(torch.complex(scale * real, scale * imaginary))[:, None]  # [B, T] to [B, 1, T]
        magnitude = (spectra.exp() - _SILENCE_MARGIN * self.floor).clamp(min=0, max=self.stft.full_scale)
        return self.stft.invert_magnitude(magnitude, self.phase_iterations)[:, None]

    def _moments(self, spectra: Tensor) -> tuple[Tensor, Tensor]:
        # [B, L, 2 C] to two [B, C, L]
        mean, scale = self.encoder(spectra).transpose(1, 2).float().chunk(2, dim=1)
        return mean, scale


def _reach(blocks: nn.Sequential) -> int:
    """Rows before and after a row that the output of `blocks` depends on."""
    return sum(cast(ConvNeXtBlock, block).reach for block in blocks)
