"""Clips that are the same up to gain, polarity and shift, and clips that repeat themselves.

Long-term spectra, which neither gain nor shift changes, find candidates; the correlation of the waveforms decides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.spatial import cKDTree

from foley.core.channels import SILENCE_PEAK
from foley.core.rates import FloatArray, resample

LONGEST_SECONDS = 30.0
"""Of a clip that is compared: its beginning, which bounds time and memory."""
_BANDS = 32
_LOWEST_HZ, _HIGHEST_HZ = 50.0, 20_000.0
_FLOOR_DB = -60.0  # below the strongest band: what lies there is noise of 16 bits
_NEAR_DB = 2.0  # between spectra of one sound that is shifted, and loses its end
_NEIGHBOURS = 6  # the clip itself among them
_LEAST_OVERLAP = 0.5  # of the shorter clip
_SHORTEST_LAG_SECONDS = 0.02  # a tone repeats itself from there on at the latest
_LEAST_ENERGY = 0.01  # of the clip: what is left of it to compare must sound

Spectrum = NDArray[np.float32]
"""A clip's energy in 32 bands in dB below the strongest, `[32]`."""
Beginning = Callable[[int], tuple[FloatArray, int]]
"""Gives one channel `[T]` of a clip by its number, and the rate."""


def band_spectrum(channel: FloatArray, sample_rate_hz: int) -> Spectrum | None:
    """Of one channel `[T]`; None where it is silent."""
    if np.abs(channel).max() < SILENCE_PEAK:
        return None
    length = next_fast_len(len(channel), real=True)
    power = np.square(np.abs(rfft(channel, length)))
    edges = np.geomspace(_LOWEST_HZ, _HIGHEST_HZ, _BANDS - 1)
    band = np.searchsorted(edges, rfftfreq(length, 1 / sample_rate_hz))
    level = 10 * np.log10(np.bincount(band, power, _BANDS) + 1e-20)
    spectrum: Spectrum = np.maximum(level - level.max(), _FLOOR_DB).astype(np.float32)
    return spectrum


@dataclass(frozen=True)
class Repeat:
    """What a clip repeats: the number of the earlier clip, how alike they are from 0 to 1, and how much later it is."""

    of: int
    similarity: float
    shift_seconds: float


def find_repeats(spectra: Sequence[Spectrum | None], beginning: Beginning, similarity: float) -> dict[int, Repeat]:
    """Clips that are an earlier one up to gain, polarity and shift, by their numbers.

    Each is compared with its five nearest by spectrum, so that time and memory grow with the clips, not their pairs.
    What is left is compared again without the repeats, until nothing is found: a sound may be there more often.

    Args:
        similarity: the magnitude of the correlation where both overlap, from which on they are the same.
    """
    left = {row: spectrum for row, spectrum in enumerate(spectra) if spectrum is not None}
    found: dict[int, Repeat] = {}
    compared: set[tuple[int, int]] = set()
    while pairs := _near(left) - compared:
        compared |= pairs
        for first, second in sorted(pairs):
            if second in found:
                continue
            alike, shift = correlate(*beginning(first), *beginning(second))
            if alike >= similarity:
                found[second] = Repeat(first, alike, shift)
        left = {row: spectrum for row, spectrum in left.items() if row not in found}
    return found


def _near(spectra: Mapping[int, Spectrum]) -> set[tuple[int, int]]:
    """Pairs of clips, the earlier one first, of which one is among the nearest of the other."""
    rows = list(spectra)
    if len(rows) < 2:
        return set()
    points = np.stack(list(spectra.values()))
    nearest = cKDTree(points).query(points, min(_NEIGHBOURS, len(rows)), distance_upper_bound=_NEAR_DB * _BANDS**0.5)
    # Without so many near it a clip has the number of all in their place.
    pairs = ((a, int(b)) for a, near in enumerate(nearest[1]) for b in near if b < len(rows) and a != b)
    return {(rows[min(pair)], rows[max(pair)]) for pair in pairs}


def correlate(one: FloatArray, one_hz: int, other: FloatArray, other_hz: int) -> tuple[float, float]:
    """How alike two channels `[T]` are where they overlap best, and by how many seconds the other is later.

    Signs and gains do not count. Where less than half of the shorter one overlaps they are not compared.

    >>> noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    >>> alike, shift = correlate(noise, 8000, -0.1 * np.pad(noise, (800, 0)), 8000)
    >>> round(alike, 3), shift
    (1.0, 0.1)
    """
    rate = min(one_hz, other_hz)
    one, other = resample(one, one_hz, rate), resample(other, other_hz, rate)
    length = next_fast_len(len(one) + len(other), real=True)
    product = irfft(np.conj(rfft(one, length)) * rfft(other, length), length)
    lag = int(np.abs(product).argmax())
    lag -= length if lag >= len(other) else 0
    first, second = one[max(0, -lag) :], other[max(0, lag) :]
    overlap = min(len(first), len(second))
    if overlap < _LEAST_OVERLAP * min(len(one), len(other)):
        return 0.0, lag / rate
    return abs(_cosine(first[:overlap], second[:overlap])), lag / rate


def _cosine(one: FloatArray, other: FloatArray) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else 0.0


def loop_seconds(channel: FloatArray, sample_rate_hz: int, similarity: float, shortest_seconds: float) -> float | None:
    """After how long a channel `[T]` repeats itself to the sample; None where it does not, or is a tone.

    The first lag of at least 20 ms at which it correlates with itself is its period. A tone has one below
    `shortest_seconds`; what has a longer one, at least twice in the clip, is a loop.
    """
    channel = channel.astype(np.float64) - channel.mean(dtype=np.float64)
    count, first = len(channel), round(_SHORTEST_LAG_SECONDS * sample_rate_hz)
    lags = np.arange(first, count // 2 + 1)
    if not len(lags) or np.abs(channel).max() < SILENCE_PEAK:
        return None
    length = next_fast_len(2 * count, real=True)
    product = irfft(np.square(np.abs(rfft(channel, length))), length)[lags]
    energy = np.pad(np.cumsum(np.square(channel)), (1, 0))
    head, tail = energy[count - lags], energy[-1] - energy[lags]
    sounds = np.minimum(head, tail) >= _LEAST_ENERGY * energy[-1]
    alike = np.where(sounds, product / np.sqrt(np.maximum(head * tail, 1e-30)), 0.0)
    over = np.flatnonzero(alike >= similarity)
    if not len(over):
        return None
    # The best of the first lags that follow each other without a gap.
    gap = np.flatnonzero(np.diff(over) > 1)
    peak = over[: gap[0] + 1] if len(gap) else over
    period = float(lags[peak[alike[peak].argmax()]]) / sample_rate_hz
    return period if period >= shortest_seconds else None
