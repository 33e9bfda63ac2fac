"""How loud a clip is, and the gain that brings it to a loudness: ITU-R BS.1770-4, as EBU R128 asks for it.

pyloudnorm weighs, blocks and gates. What is here is what it leaves open: clips that it cannot measure, true peaks, and
a gain that keeps them below a ceiling.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyloudnorm

from foley.core.channels import SILENCE_PEAK
from foley.core.rates import HIGHEST_RATE_HZ, FloatArray, resample

SHORTEST_SECONDS = 0.4
"""A gating block: what is shorter has no integrated loudness."""
GATE_LUFS = -70.0
"""Blocks below the absolute gate count as silence, so that no clip is quieter."""
_MOST_CHANNELS = 5  # whose weights BS.1770 gives
# At half of it lies no band that K-weighting shapes; the filters of pyloudnorm are unstable below 3 kHz.
_LEAST_RATE_HZ = 16_000
_OVERSAMPLING = 4  # BS.1770-4, annex 2


def decibels(magnitude: float) -> float | None:
    """Of full scale, to two decimals; None for silence.

    >>> decibels(0.5), decibels(0.0)
    (-6.02, None)
    """
    return round(20 * math.log10(magnitude), 2) if magnitude > 0 else None


def integrated_loudness(samples: FloatArray, sample_rate_hz: int) -> float | None:
    """LUFS of `[T, channels]`, gated (BS.1770-4, equations 2 to 7).

    None where the clip has none: shorter than a block, silent by the absolute gate, or of more than five channels.

    >>> tone = np.sin(2 * np.pi * 997 * np.arange(48000) / 48000)
    >>> round(integrated_loudness(tone[:, None], 48000))  # -3.01 by the standard: the weighting adds 0.691 dB here
    -3
    """
    if len(samples) < SHORTEST_SECONDS * sample_rate_hz or samples.shape[1] > _MOST_CHANNELS:
        return None
    rate = max(sample_rate_hz, _LEAST_RATE_HZ)
    at_rate = resample(samples.T, sample_rate_hz, rate).T.astype(np.float64)
    measured = float(pyloudnorm.Meter(rate).integrated_loudness(at_rate))
    return measured if math.isfinite(measured) else None


def true_peak(samples: FloatArray, sample_rate_hz: int) -> float:
    """The largest magnitude of `[T, channels]` between samples too, by four times their rate (BS.1770-4, annex 2).

    >>> rate, phase = 48000, np.pi / 4  # a quarter of the rate, sampled beside its peaks
    >>> tone = np.sin(2 * np.pi * np.arange(rate) / 4 + phase)[:, None] * np.hanning(rate)[:, None]
    >>> round(float(np.abs(tone).max()), 3), round(true_peak(tone.astype(np.float32), rate), 3)
    (0.707, 1.0)
    """
    factor = max(1, min(_OVERSAMPLING, HIGHEST_RATE_HZ // sample_rate_hz))
    between = resample(samples.T, sample_rate_hz, factor * sample_rate_hz)
    return float(max(np.abs(samples).max(), np.abs(between).max()))


@dataclass(frozen=True)
class Levelling:
    """What brings a clip to a loudness.

    Args:
        gain: to multiply the clip by.
        measured_lufs: of the clip as it is; None where it has no loudness.
        left: why the clip stays as it is; empty where it does not.
        limited: its true peak keeps it below the loudness that was asked for.
    """

    gain: float
    measured_lufs: float | None
    left: str = ""
    limited: bool = False

    def to_json(self, target_lufs: float) -> dict[str, Any]:
        """For the JSON of the clip."""
        measured = None if self.measured_lufs is None else round(self.measured_lufs, 2)
        told = {"left": self.left} if self.left else {"limited_by_true_peak": self.limited}
        return {"target_lufs": target_lufs, "measured_lufs": measured, **told}


def level_to(samples: FloatArray, sample_rate_hz: int, target_lufs: float, peak_ceiling: float) -> Levelling:
    """The gain of `[T, channels]` to an integrated loudness, or to a true peak at the ceiling where that comes first.

    >>> noise = 0.01 * np.random.default_rng(0).standard_normal((48000, 1)).astype(np.float32)
    >>> levelling = level_to(noise, 24000, target_lufs=-23.0, peak_ceiling=0.9)
    >>> round(integrated_loudness(levelling.gain * noise, 24000), 2)
    -23.0
    """
    if len(samples) < SHORTEST_SECONDS * sample_rate_hz:
        return Levelling(1.0, None, f"shorter than {SHORTEST_SECONDS:g} s, a block of BS.1770")
    if np.abs(samples).max() < SILENCE_PEAK:
        return Levelling(1.0, None, "silent")
    measured = integrated_loudness(samples, sample_rate_hz)
    if measured is None:
        return Levelling(1.0, None, f"without loudness: below {GATE_LUFS:g} LUFS, or of too many channels")
    wanted = 10 ** ((target_lufs - measured) / 20)
    highest = peak_ceiling / true_peak(samples, sample_rate_hz)
    return Levelling(min(wanted, highest), measured, limited=highest < wanted)
