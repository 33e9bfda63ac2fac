"""What can be measured of one waveform that one would hear: clipping, offset, clicks, silence, bandwidth, channels.

Each function takes samples `[T, channels]` in full scale, or one channel `[T]`, and has a closed form on a made fault.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import welch

from foley.core.channels import SILENCE_PEAK
from foley.core.rates import FloatArray

FULL_SCALE = 32767 / 32768
"""The largest positive sample of 16 bits, which is where a clipped recording stays."""
_STEP = 1 / 32768
# The top of a smooth wave, rounded to 16 bits, may hold a few equal samples; the next one lies at most 4 steps below.
_CORNER = 8 * _STEP
_FRAME_SECONDS = 0.01
_AROUND_SECONDS = 0.0015  # on each side of a jump
_LEAST_AROUND = 16  # samples
_BESIDE = 2  # samples beside a jump that may belong to it
_SPECTRUM_SAMPLES = 2048
_NEARLY_ALL = 0.999  # of the energy
_USUAL_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_BELOW, _ABOVE = np.array([0.8, 0.95]), np.array([1.05, 1.3])  # of a cut-off: what a resampler's slope does not reach
_LEAST_BINS = 3


def clipped_runs(samples: FloatArray, run_samples: int) -> tuple[int, int]:
    """How many runs of `[T, channels]` stay at full scale or beyond, and how many are flat tops below it.

    A run has `run_samples` or more in one channel. A flat top holds equal samples at the channel's extreme, with a
    corner on both sides: a wave that was clipped and made quieter since, not the round top of a low tone.
    """
    full = flat = 0
    for channel in samples.T:
        full += len(_runs(np.abs(channel) >= FULL_SCALE, run_samples))
        for signed in (channel, -channel):
            top = float(signed.max())
            if SILENCE_PEAK < top < FULL_SCALE:
                outside = np.pad(signed, 1)
                ends = _runs(signed == top, run_samples)
                flat += sum(
                    max(outside[first], outside[last + 1]) < top - _CORNER
                    for first, last in ends
                    if first > 0 and last < len(signed)  # where a clip is cut is a matter of its ends
                )
    return full, int(flat)


def _runs(held: NDArray[np.bool_], least: int) -> list[tuple[int, int]]:
    """`[first, last)` of each run of true values that is long enough."""
    edges = np.flatnonzero(np.diff(np.pad(held.astype(np.int8), 1)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= least]


def dc_offset(samples: FloatArray) -> float:
    """The largest mean of a channel, in full scale, with its sign."""
    means = samples.mean(axis=0, dtype=np.float64)
    return float(means[np.abs(means).argmax()])


@dataclass(frozen=True)
class Clicks:
    """Jumps that stand out of the steps around them: at the start, at the end, and how many inside.

    `start_jump` and `end_jump` are how far the clip begins and ends from zero, over its own peak.
    """

    start: bool
    end: bool
    inside: int
    start_jump: float
    end_jump: float


def find_clicks(
    samples: FloatArray, sample_rate_hz: int, ends_ratio: float, inside_ratio: float, least_jump: float
) -> Clicks:
    """One rule for a clip `[T, channels]` that stands in silence: a step from one sample to the next is a click where
    it is so many times the root mean square of the steps before it, and of those behind it.

    The onset of noise is none: the steps behind it are as large. Nor is the beginning of a tone at a zero.

    Args:
        ends_ratio, inside_ratio: how many times, of the first and last step and of those between.
        least_jump: over the clip's peak; smaller steps are not heard.
    """
    peak, around = float(np.abs(samples).max()), max(_LEAST_AROUND, round(_AROUND_SECONDS * sample_rate_hz))
    if peak < SILENCE_PEAK:
        return Clicks(False, False, 0, 0.0, 0.0)
    steps = np.abs(np.diff(np.pad(samples.astype(np.float64), ((1, 1), (0, 0))), axis=0))  # [T + 1, channels]
    ratios = np.stack([channel / _roughness(channel, around) for channel in steps.T], axis=1)
    heard: NDArray[np.bool_] = steps >= max(least_jump * peak, _CORNER)
    start, end = (bool(((ratios[place] >= ends_ratio) & heard[place]).any()) for place in (0, -1))
    hits = np.flatnonzero(((ratios >= inside_ratio) & heard)[1:-1].any(axis=1))
    count = int((np.diff(hits, prepend=-1 - around) > around).sum())  # a wrong sample has two steps
    jumps = np.abs(samples[[0, -1]]).max(axis=1) / peak
    return Clicks(start, end, count, float(jumps[0]), float(jumps[1]))


def _roughness(steps: NDArray[np.float64], around: int) -> NDArray[np.float64]:
    """The larger of the root mean squares of the steps before and behind each, at least a step of 16 bits."""
    power = np.pad(np.cumsum(np.square(steps)), (1, 0))
    place, count = np.arange(len(steps)), len(steps)

    def between(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.float64]:
        first, last = first.clip(0, count), last.clip(0, count)
        mean = (power[last] - power[first]) / (last - first).clip(min=1)
        return np.sqrt(mean.clip(min=0))

    before = between(place - _BESIDE - around, place - _BESIDE)
    behind = between(place + _BESIDE + 1, place + _BESIDE + 1 + around)
    return np.maximum(np.maximum(before, behind), _STEP)


@dataclass(frozen=True)
class Silence:
    """The share of frames of 10 ms that are silent, and seconds of silence at the start and at the end."""

    share: float
    leading_seconds: float
    trailing_seconds: float


def find_silence(samples: FloatArray, sample_rate_hz: int, level: float) -> Silence:
    """Of `[T, channels]`, where no channel rises above `level` of full scale."""
    magnitude = np.abs(samples).max(axis=1)
    seconds, loud = len(magnitude) / sample_rate_hz, np.flatnonzero(magnitude > level)
    if not len(loud):
        return Silence(1.0, seconds, seconds)
    starts = np.arange(0, len(magnitude), max(1, round(_FRAME_SECONDS * sample_rate_hz)))
    share = float((np.maximum.reduceat(magnitude, starts) <= level).mean())
    return Silence(share, float(loud[0]) / sample_rate_hz, (len(magnitude) - 1 - float(loud[-1])) / sample_rate_hz)


@dataclass(frozen=True)
class Bandwidth:
    """Below which frequency nearly all (99.9 %) of the energy lies, and at which cut-off the spectrum falls most.

    `cutoff_drop_db` is by how much it falls there; both are None for a rate that has no room for a cut-off.
    """

    bandwidth_hz: float
    cutoff_hz: float | None
    cutoff_drop_db: float | None


def find_bandwidth(channel: FloatArray, sample_rate_hz: int, cutoff_share: float) -> Bandwidth:
    """Of one channel `[T]`, by its mean power spectrum.

    Cut-offs are looked for at the halves of lower usual rates, where the low-pass of a resampler leaves them: the
    medians of the bands just below and just above differ. Single tones move no median, and sounds end elsewhere.

    Args:
        cutoff_share: of half the rate, up to which a cut-off is looked for.
    """
    frequency, power = welch(
        channel.astype(np.float64), sample_rate_hz, nperseg=min(_SPECTRUM_SAMPLES, len(channel)), detrend=False
    )
    within = np.cumsum(power)
    bandwidth = float(frequency[np.searchsorted(within, _NEARLY_ALL * within[-1])]) if within[-1] else 0.0
    level = 10 * np.log10(power + 1e-20)
    drops = {}
    for cutoff in (rate / 2 for rate in _USUAL_RATES_HZ if rate <= cutoff_share * sample_rate_hz):
        below, above = (level[slice(*np.searchsorted(frequency, band * cutoff))] for band in (_BELOW, _ABOVE))
        if min(len(below), len(above)) >= _LEAST_BINS:
            drops[cutoff] = float(np.median(below) - np.median(above))
    if not drops:
        return Bandwidth(bandwidth, None, None)
    steepest = max(drops, key=lambda place: drops[place])
    return Bandwidth(bandwidth, steepest, drops[steepest])


@dataclass(frozen=True)
class Channels:
    """How many channels are silent, and the lowest correlation of two of the others; None without two."""

    silent: int
    correlation: float | None


def compare_channels(samples: FloatArray) -> Channels:
    """Of `[T, channels]`: 1 where all hold the same up to a gain, -1 where two are in antiphase."""
    heard = samples[:, np.abs(samples).max(axis=0) >= SILENCE_PEAK].astype(np.float64)
    silent = samples.shape[1] - heard.shape[1]
    centred = heard - heard.mean(axis=0)
    norms = np.sqrt(np.square(centred).sum(axis=0))
    if heard.shape[1] < 2 or not norms.all():
        return Channels(silent, None)
    return Channels(silent, float(np.clip(centred.T @ centred / np.outer(norms, norms), -1, 1).min()))
