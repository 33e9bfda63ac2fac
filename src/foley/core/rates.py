"""What a sample rate decides: how many samples and latent frames a clip has, and audio at another rate."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import firwin, resample_poly

_FILTER_ZERO_CROSSINGS = 16
_KAISER_BETA = 8.0

FloatArray = NDArray[np.float32]


def clip_size(duration_seconds: float, sample_rate_hz: int, hop_samples: int) -> tuple[int, int]:
    """The samples T of a clip, at least one, and the latent frames L that cover them.

    >>> clip_size(10.0, sample_rate_hz=24000, hop_samples=480)
    (240000, 500)
    """
    num_samples = max(1, round(duration_seconds * sample_rate_hz))
    return num_samples, math.ceil(num_samples / hop_samples)


def resample(samples: FloatArray, from_hz: int, to_hz: int) -> FloatArray:
    """`[T]` at `from_hz` to `[ceil(T * to_hz / from_hz)]` at `to_hz`, through a polyphase Kaiser filter.

    >>> resample(np.zeros(44100, np.float32), 44100, 24000).shape
    (24000,)
    """
    if from_hz == to_hz:
        return samples
    divisor = math.gcd(from_hz, to_hz)
    up, down = to_hz // divisor, from_hz // divisor
    resampled: FloatArray = resample_poly(samples, up, down, window=_low_pass(up, down)).astype(np.float32, copy=False)
    return resampled


@lru_cache(maxsize=32)
def _low_pass(up: int, down: int) -> FloatArray:
    """Taps of a windowed sinc at the intermediate rate, cut off at the lower of the two Nyquist frequencies."""
    widest = max(up, down)
    taps = firwin(2 * _FILTER_ZERO_CROSSINGS * widest + 1, 1.0 / widest, window=("kaiser", _KAISER_BETA))
    return taps.astype(np.float32)
