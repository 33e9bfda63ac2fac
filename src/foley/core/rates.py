"""What a sample rate decides: how many samples and latent frames a clip has, and audio at another rate."""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import firwin, resample_poly

_FILTER_ZERO_CROSSINGS = 16
_KAISER_BETA = 8.0
# The filter has 32 taps for each; beyond it the nearest ratio is taken, at most 21 parts in a million away.
_MOST_PHASES = 48_000

LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 100, 768_000
"""Of any recording: from what sensors write to the fastest converters."""

FloatArray = NDArray[np.float32]


def clip_size(duration_seconds: float, sample_rate_hz: int, hop_samples: int) -> tuple[int, int]:
    """The samples T of a clip, at least one, and the latent frames L that cover them.

    >>> clip_size(10.0, sample_rate_hz=24000, hop_samples=480)
    (240000, 500)
    """
    num_samples = max(1, round(duration_seconds * sample_rate_hz))
    return num_samples, math.ceil(num_samples / hop_samples)


def is_sample_rate(rate_hz: float) -> bool:
    """Whether recordings have such a rate."""
    return LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ


def resample(samples: FloatArray, from_hz: int, to_hz: int) -> FloatArray:
    """`[..., T]` at `from_hz` to `[..., ceil(T * to_hz / from_hz)]` at `to_hz`, through a polyphase Kaiser filter.

    Raises ValueError for a rate that no recording has (`is_sample_rate`): its filter alone could take gigabytes.

    >>> resample(np.zeros(44100, np.float32), 44100, 24000).shape
    (24000,)
    """
    if from_hz == to_hz:
        return samples
    for rate in (from_hz, to_hz):
        if not is_sample_rate(rate):
            raise ValueError(f"cannot resample {rate} Hz: rates lie between {LOWEST_RATE_HZ} and {HIGHEST_RATE_HZ} Hz")
    up, down = _ratio(from_hz, to_hz)
    length = -(-samples.shape[-1] * to_hz // from_hz)
    resampled: FloatArray = resample_poly(samples, up, down, axis=-1, window=_low_pass(up, down))[..., :length]
    if (missing := length - resampled.shape[-1]) > 0:  # by a ratio that is not quite that of the rates
        resampled = np.pad(resampled, [(0, 0)] * (resampled.ndim - 1) + [(0, missing)])
    return resampled.astype(np.float32, copy=False)


def _ratio(from_hz: int, to_hz: int) -> tuple[int, int]:
    """Up and down, in lowest terms, neither beyond `_MOST_PHASES`."""
    low, high = sorted((from_hz, to_hz))
    share = Fraction(low, high).limit_denominator(_MOST_PHASES)
    terms = share.numerator, share.denominator
    return terms if to_hz == low else terms[::-1]


@lru_cache(maxsize=32)
def _low_pass(up: int, down: int) -> FloatArray:
    """Taps of a windowed sinc at the intermediate rate, cut off at the lower of the two Nyquist frequencies."""
    widest = max(up, down)
    taps = firwin(2 * _FILTER_ZERO_CROSSINGS * widest + 1, 1.0 / widest, window=("kaiser", _KAISER_BETA))
    return taps.astype(np.float32)
