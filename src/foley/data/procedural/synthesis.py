"""The time axis that a procedural sound is drawn on, and the few operations that every renderer is made of.

All signals are float64 arrays `[T]`; levels are relative, the data set scales the finished clip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len

Signal = NDArray[np.float64]


@dataclass(frozen=True)
class Timeline:
    """`samples` T at `sample_rate_hz`, and the clip's own random generator."""

    samples: int
    sample_rate_hz: int
    rng: np.random.Generator

    @cached_property
    def time(self) -> Signal:
        """Seconds since the start, `[T]`."""
        return np.arange(self.samples) / self.sample_rate_hz

    @property
    def duration_seconds(self) -> float:
        return self.samples / self.sample_rate_hz

    def part(self, duration_seconds: float) -> "Timeline":
        """A timeline of its own length that shares the generator: for a kernel that is placed several times."""
        return Timeline(max(1, round(duration_seconds * self.sample_rate_hz)), self.sample_rate_hz, self.rng)


def cycles(timeline: Timeline, frequency_hz: float | Signal, start: float = 0.0) -> Signal:
    """Running phase in cycles `[T]`: the integral of a constant or varying frequency."""
    if isinstance(frequency_hz, np.ndarray):
        return start + np.cumsum(frequency_hz) / timeline.sample_rate_hz
    return start + frequency_hz * timeline.time


def sine(phase_cycles: Signal) -> Signal:
    """A sine of the given running phase."""
    return np.sin(2 * np.pi * phase_cycles)


def harmonics(timeline: Timeline, frequency_hz: float | Signal, amplitudes: Signal) -> Signal:
    """A harmonic sound `[T]`; `amplitudes[k]` belongs to harmonic k + 1, left out where it nears the Nyquist rate."""
    top_hz = float(np.max(frequency_hz))
    audible = amplitudes[: max(1, int(0.45 * timeline.sample_rate_hz / top_hz))]
    # Powers of one complex rotation: a multiplication per harmonic instead of a sine.
    rotation = np.exp(2j * np.pi * cycles(timeline, frequency_hz))
    power, total = rotation.copy(), np.zeros(timeline.samples)
    for amplitude in audible:
        total += amplitude * power.imag
        power *= rotation
    return total


def shaped_noise(timeline: Timeline, gain: Callable[[Signal], Signal]) -> Signal:
    """Stationary Gaussian noise `[T]` of unit variance whose spectrum has the magnitude `gain(frequency_hz)`."""
    length = next_fast_len(max(timeline.samples, 64), real=True)
    frequency_hz = np.fft.rfftfreq(length, 1 / timeline.sample_rate_hz)
    draws = timeline.rng.standard_normal((2, frequency_hz.size))
    spectrum = (draws[0] + 1j * draws[1]) * gain(np.maximum(frequency_hz, frequency_hz[1]))
    spectrum[0] = 0
    noise: Signal = irfft(spectrum, length)[: timeline.samples]
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


def lowpass(cutoff_hz: float, order: int = 2) -> Callable[[Signal], Signal]:
    """Butterworth-like gain that passes everything below the cutoff."""
    return lambda frequency_hz: 1 / np.sqrt(1 + (frequency_hz / cutoff_hz) ** (2 * order))


def bandpass(low_hz: float, high_hz: float, order: int = 3) -> Callable[[Signal], Signal]:
    """Gain that passes what lies between two frequencies."""
    upper = lowpass(high_hz, order)
    return lambda frequency_hz: upper(frequency_hz) / np.sqrt(1 + (low_hz / frequency_hz) ** (2 * order))


def decay(timeline: Timeline, decay_seconds: float, attack_seconds: float = 0.002) -> Signal:
    """Percussive envelope `[T]`: a short linear attack, then an exponential fall by 1/e each `decay_seconds`."""
    return np.minimum(timeline.time / attack_seconds, 1.0) * np.exp(-timeline.time / decay_seconds)


def pulses(phase_cycles: Signal, duty: float, edge: float = 0.05) -> Signal:
    """On-off gate `[T]` in [0, 1], on for `duty` of each cycle, with linear edges of `edge` cycles."""
    position = phase_cycles % 1.0
    return np.clip(np.minimum(position, duty - position) / edge, 0.0, 1.0)


def smooth_random(timeline: Timeline, rate_hz: float) -> Signal:
    """A slowly wandering curve `[T]` in [0, 1] that takes a new direction about `rate_hz` times a second."""
    knots = max(4, int(timeline.duration_seconds * rate_hz) + 4)
    values = timeline.rng.random(knots)
    position = timeline.rng.random() + timeline.time * rate_hz
    index = np.minimum(position.astype(np.intp), knots - 2)
    blend = 0.5 - 0.5 * np.cos(np.pi * np.clip(position - index, 0, 1))
    return values[index] * (1 - blend) + values[index + 1] * blend


def regular_onsets(timeline: Timeline, rate_hz: float, jitter: float = 0.0) -> Signal:
    """Onset times in seconds, `rate_hz` a second, each shifted by up to `jitter` periods; the first comes early."""
    period = 1 / rate_hz
    first = 0.4 * timeline.rng.random() * min(period, timeline.duration_seconds)
    onsets = np.arange(first, timeline.duration_seconds, period)
    return np.clip(onsets + jitter * period * timeline.rng.uniform(-1, 1, onsets.size), 0, None)


def random_onsets(timeline: Timeline, rate_hz: float) -> Signal:
    """About `rate_hz` onset times a second, uniformly at random, at least one."""
    count = max(1, timeline.rng.poisson(rate_hz * timeline.duration_seconds))
    return timeline.rng.random(count) * 0.95 * timeline.duration_seconds


def place(
    timeline: Timeline, onsets_seconds: Signal, kernels: list[Signal], amplitudes: Signal | None = None
) -> Signal:
    """Sum of kernels `[T]`; onset i starts kernel `i mod len(kernels)`, cut off at the end of the timeline."""
    total = np.zeros(timeline.samples)
    for number, onset in enumerate(onsets_seconds):
        start = int(onset * timeline.sample_rate_hz)
        kernel = kernels[number % len(kernels)][: max(0, timeline.samples - start)]
        total[start : start + kernel.size] += kernel if amplitudes is None else amplitudes[number] * kernel
    return total
