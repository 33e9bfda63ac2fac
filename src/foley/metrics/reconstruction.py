"""How close a reconstruction is to its original; every function gives one value per item, `[B]`."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

_TINY_POWER = 1e-8
_MEL_FLOOR = 1e-5
_STFT_FLOOR = 1e-5


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, eq. 2), of `[B, 1, T]` waveforms.

    Means are removed; a small power keeps silent references finite.
    """
    estimate, reference = (
        signal.flatten(1) - signal.flatten(1).mean(1, keepdim=True) for signal in (estimate, reference)
    )
    scale = (estimate * reference).sum(1) / (reference.square().sum(1) + _TINY_POWER)
    target = scale[:, None] * reference
    distortion = (estimate - target).square().sum(1)
    return 10 * torch.log10((target.square().sum(1) + _TINY_POWER) / (distortion + _TINY_POWER))


def mel_distance(estimate: Tensor, reference: Tensor, sample_rate_hz: int) -> Tensor:
    """Mean absolute difference of natural-log mel spectrograms: 80 bands, window 1024, hop 256, floor 1e-5."""
    transform = _mel_transform(sample_rate_hz).to(reference.device)
    logs = [transform(signal.flatten(1)).clamp(min=_MEL_FLOOR).log() for signal in (estimate, reference)]
    return (logs[0] - logs[1]).abs().mean((1, 2))


def stft_distance(estimate: Tensor, reference: Tensor, fft_sizes: Sequence[int] = (2048, 512, 128)) -> Tensor:
    """Mean absolute difference of natural-log magnitudes, averaged over resolutions (hop a quarter, floor 1e-5)."""
    distances = []
    for size in fft_sizes:
        window = torch.hann_window(size, device=reference.device)
        logs = [_log_magnitude(signal.flatten(1), window) for signal in (estimate, reference)]
        distances.append((logs[0] - logs[1]).abs().mean((1, 2)))
    return torch.stack(distances).mean(0)


def _log_magnitude(audio: Tensor, window: Tensor) -> Tensor:
    spectrum = torch.stft(audio, len(window), len(window) // 4, window=window, return_complex=True)
    return spectrum.abs().clamp(min=_STFT_FLOOR).log()


@lru_cache(maxsize=4)
def _mel_transform(sample_rate_hz: int) -> MelSpectrogram:
    return MelSpectrogram(sample_rate_hz, n_fft=1024, hop_length=256, n_mels=80, power=1.0)
