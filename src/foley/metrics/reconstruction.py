"""How well a codec gives audio back, and the baselines that it is compared with.

Every distance gives one value an item, `[B]`, the mean of those of its channels; a baseline has a codec's
`sample_rate_hz`, `kilobits_per_second` and `reconstruct`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import GriffinLim as PhaseSearch
from torchaudio.transforms import MelSpectrogram

from foley.core.numbers import NumberRange
from foley.core.rates import resample

_TINY_POWER = 1e-8
_MEL_FLOOR = 1e-5
_STFT_FLOOR = 1e-5
_VISQOL_HZ = 48000  # of its mode for sounds of all kinds
_VISQOL_SECONDS = 1.0  # a little more than it takes at least
_OPUS_BITS, _OPUS_SPAN = 6000, 250_000  # libsndfile's least rate of a channel, and how far its levels reach above it


def _by_channel(distance: Callable[[Tensor, Tensor], Tensor], estimate: Tensor, reference: Tensor) -> Tensor:
    """A `distance` of waveforms `[N, T]`, of every channel of `[B, channels, T]` by itself, averaged: `[B]`."""
    each = distance(estimate.flatten(0, 1), reference.flatten(0, 1))  # [B channels]
    return each.unflatten(0, reference.shape[:2]).mean(1)


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, eq. 2), of `[B, channels, T]` waveforms.

    Means are removed; a small power keeps silent references finite.

    >>> reference = torch.sin(torch.arange(8000) / 9)[None, None]
    >>> noise = torch.randn(1, 1, 8000)
    >>> si_sdr(2 * reference + 0.1 * noise, reference).round().item()  # the scale does not count
    23.0
    """
    return _by_channel(_si_sdr, estimate, reference)


def _si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    estimate, reference = (signal - signal.mean(1, keepdim=True) for signal in (estimate, reference))
    scale = (estimate * reference).sum(1) / (reference.square().sum(1) + _TINY_POWER)  # [N], the best one
    target = scale[:, None] * reference
    distortion = (estimate - target).square().sum(1)
    return 10 * torch.log10((target.square().sum(1) + _TINY_POWER) / (distortion + _TINY_POWER))


def mel_distance(estimate: Tensor, reference: Tensor, sample_rate_hz: int) -> Tensor:
    """Mean absolute difference of natural-log mel spectrograms: 80 bands, window 1024, hop 256, floor 1e-5."""
    transform = _mel_transform(sample_rate_hz).to(reference.device)

    def distance(*signals: Tensor) -> Tensor:
        logs = [transform(signal).clamp(min=_MEL_FLOOR).log() for signal in signals]
        return (logs[0] - logs[1]).abs().mean((1, 2))

    return _by_channel(distance, estimate, reference)


def stft_distance(estimate: Tensor, reference: Tensor, fft_sizes: Sequence[int] = (2048, 512, 128)) -> Tensor:
    """Mean absolute difference of natural-log magnitudes, averaged over resolutions (hop a quarter, floor 1e-5)."""

    def distance(*signals: Tensor) -> Tensor:
        distances = []
        for size in fft_sizes:
            window = torch.hann_window(size, device=reference.device)
            logs = [_log_magnitude(signal, window) for signal in signals]
            distances.append((logs[0] - logs[1]).abs().mean((1, 2)))
        return torch.stack(distances).mean(0)

    return _by_channel(distance, estimate, reference)


def visqol(estimate: Tensor, reference: Tensor, sample_rate_hz: int) -> Tensor:
    """How alike the two sound, a mean opinion score from 1 to 4.73, by ViSQOL v3 (Chinen et al. 2020).

    Its mode for sounds of all kinds, by the package visqol-python (Apache 2.0): gammatone spectra at 48 kHz are
    compared patch by patch, and a support vector machine that learnt from listening tests makes a score of that. Audio
    of under 1 s, which is shorter than a patch, is repeated.

    Raises ModuleNotFoundError without the package.
    """
    judge = _visqol()

    def distance(*signals: Tensor) -> Tensor:
        pairs = zip(*(_for_visqol(signal, sample_rate_hz) for signal in signals), strict=True)
        return torch.tensor([judge.measure_from_arrays(known, heard, _VISQOL_HZ).moslqo for heard, known in pairs])

    return _by_channel(distance, estimate, reference)


def _for_visqol(signals: Tensor, sample_rate_hz: int) -> list[Any]:
    times = -(-round(_VISQOL_SECONDS * sample_rate_hz) // signals.shape[1])  # rounded up
    repeated = (np.tile(signal, times) for signal in signals.double().cpu().numpy())
    return [resample(signal, sample_rate_hz, _VISQOL_HZ).astype(np.float64) for signal in repeated]


@lru_cache(maxsize=1)
def _visqol() -> Any:
    try:
        from visqol import VisqolApi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"visqol=true wants {error.name}: pip install visqol-python, which compiles libsvm, with a C++ compiler"
        ) from error
    judge = VisqolApi()
    judge.create(mode="audio")
    return judge


def _log_magnitude(audio: Tensor, window: Tensor) -> Tensor:
    spectrum = torch.stft(audio, len(window), len(window) // 4, window=window, return_complex=True)
    return spectrum.abs().clamp(min=_STFT_FLOOR).log()


@lru_cache(maxsize=4)
def _mel_transform(sample_rate_hz: int) -> MelSpectrogram:
    return MelSpectrogram(sample_rate_hz, n_fft=1024, hop_length=256, n_mels=80, power=1.0)


class GriffinLim(nn.Module):
    """A mel spectrogram and back: magnitudes by least squares, phases by Griffin and Lim (1984, with momentum).

    What a mel front end keeps where no vocoder was trained.

    Args:
        fft_size: window length in samples; the hop is a quarter of it.
        mel_bands: from 0 Hz to half the rate.
        iterations: of the phase search.
    """

    window: Tensor
    bands: Tensor
    inverse: Tensor

    def __init__(self, sample_rate_hz: int, fft_size: int = 1024, mel_bands: int = 80, iterations: int = 32) -> None:
        super().__init__()
        self.sample_rate_hz = sample_rate_hz
        self.kilobits_per_second = 16 * mel_bands * sample_rate_hz / (fft_size // 4) / 1000  # in half precision
        self.fft_size = fft_size
        bands = melscale_fbanks(fft_size // 2 + 1, 0.0, sample_rate_hz / 2, mel_bands, sample_rate_hz)
        self.register_buffer("window", torch.hann_window(fft_size))
        self.register_buffer("bands", bands)
        self.register_buffer("inverse", torch.linalg.pinv(bands))
        self.phases = PhaseSearch(fft_size, iterations, hop_length=fft_size // 4, power=1.0, rand_init=False)

    def reconstruct(self, audio: Tensor) -> Tensor:
        """`[B, channels, T]` to the same shape, channel by channel."""
        padded = F.pad(audio.flatten(0, 1), (0, max(0, self.fft_size - audio.shape[-1])))
        spectrum = torch.stft(padded, self.fft_size, self.fft_size // 4, window=self.window, return_complex=True)
        mel = spectrum.abs().mT @ self.bands
        restored = self.phases((mel @ self.inverse).clamp(min=0).mT)
        length = audio.shape[-1]
        return F.pad(restored, (0, max(0, length - restored.shape[-1])))[:, :length].unflatten(0, audio.shape[:2])


class Opus(nn.Module):
    """The codec of calls and broadcasts (RFC 6716), by libsndfile's encoder and decoder, which undo its delay.

    Args:
        kilobits_per_second: asked of the encoder for each channel, which spends more on what is hard than on what is
            easy; at least 6.
        sample_rate_hz: 8000, 12000, 16000, 24000 or 48000.

    Raises ValueError for a bit rate that libsndfile cannot ask for.

    Example:
        >>> Opus(24).reconstruct(torch.randn(1, 1, 4800)).shape
        torch.Size([1, 1, 4800])
    """

    def __init__(self, kilobits_per_second: float, sample_rate_hz: int = 24000) -> None:
        super().__init__()
        highest = (_OPUS_BITS + _OPUS_SPAN) / 1000
        NumberRange(least=_OPUS_BITS / 1000, most=highest).check("kilobits_per_second", kilobits_per_second)
        self.kilobits_per_second, self.sample_rate_hz = kilobits_per_second, sample_rate_hz

    def encode(self, samples: np.ndarray) -> bytes:
        """`[T]` as an Ogg file."""
        level = 1 - (1000 * self.kilobits_per_second - _OPUS_BITS) / _OPUS_SPAN
        content = BytesIO()
        soundfile.write(content, samples, self.sample_rate_hz, "OPUS", format="OGG", compression_level=level)
        return content.getvalue()

    def reconstruct(self, audio: Tensor) -> Tensor:
        """`[B, channels, T]` to the same shape, channel by channel."""
        files = [self.encode(samples) for samples in audio.flatten(0, 1).cpu().numpy()]
        restored = [soundfile.read(BytesIO(file), dtype="float32")[0] for file in files]
        return torch.from_numpy(np.stack(restored)).unflatten(0, audio.shape[:2])


def signal_to_noise_by_direction(means: Tensor, stds: Tensor) -> Tensor:
    """Of a codec's posteriors, each `[N, C]`: how far the means spread beyond their noise, in C directions, `[C]`.

    The directions are those in which the noise is equal in all, and the means are not correlated; the ratios, of
    variances, fall. What lies below 1 says little of a sound.

    >>> means = torch.randn(4000, 2) @ torch.tensor([[1.0, 1.0], [0.0, 0.01]])  # two channels that say one thing
    >>> signal_to_noise_by_direction(means, torch.full((4000, 2), 0.1)).div(100).round()
    tensor([2., 0.])
    """
    whitened = (means - means.mean(0)).double() / stds.double().square().mean(0).sqrt()
    return torch.linalg.eigvalsh(torch.cov(whitened.T)).flip(0).clamp(min=0).float()
