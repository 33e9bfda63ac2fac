"""Sample-rate conversion of stored audio."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import firwin, resample_poly

_FILTER_ZERO_CROSSINGS = 16
_KAISER_BETA = 8.0

FloatArray = NDArray[np.float32]


def resample(samples: FloatArray, from_hz: int, to_hz: int) -> FloatArray:
    """`[T]` at `from_hz` to `[ceil(T * to_hz / from_hz)]` at `to_hz`, through a polyphase Kaiser filter."""
    if from_hz == to_hz:
        return samples
    divisor = math.gcd(from_hz, to_hz)
    up, down = to_hz // divisor, from_hz // divisor
    resampled: FloatArray = resample_poly(samples, up, down, window=_low_pass(up, down)).astype(np.float32, copy=False)
    return resampled


@lru_cache(maxsize=32)
def _low_pass(up: int, down: int) -> FloatArray:
    widest = max(up, down)
    taps = firwin(2 * _FILTER_ZERO_CROSSINGS * widest + 1, 1.0 / widest, window=("kaiser", _KAISER_BETA))
    return taps.astype(np.float32)
