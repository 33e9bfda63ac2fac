"""What is done to a clip's samples: level, crop, and augmentation keyed by a generator."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

SILENCE_PEAK = 1e-5
"""A clip whose largest sample is below this (-100 dB of full scale) counts as silent."""


def is_silent(audio: Tensor) -> bool:
    """Whether no sample of `audio [T]` rises above `SILENCE_PEAK`."""
    return bool(audio.abs().amax() < SILENCE_PEAK)


@dataclass(frozen=True)
class PeakLevel:
    """Scales a clip so that its largest sample is at `peak_db` of full scale; a silent clip is left as it is."""

    peak_db: float = -1.0

    def __call__(self, audio: Tensor) -> Tensor:
        peak = float(audio.abs().amax())
        return audio if peak < SILENCE_PEAK else audio * (decibels_to_gain(self.peak_db) / peak)


@dataclass(frozen=True)
class RmsLevel:
    """Scales a clip to a root mean square of `rms_db`, or less where its peaks would pass `peak_db`."""

    rms_db: float = -20.0
    peak_db: float = -1.0

    def __call__(self, audio: Tensor) -> Tensor:
        peak = float(audio.abs().amax())
        if peak < SILENCE_PEAK:
            return audio
        rms = float(audio.square().mean().sqrt())
        return audio * min(decibels_to_gain(self.rms_db) / rms, decibels_to_gain(self.peak_db) / peak)


@dataclass(frozen=True)
class Augmentation:
    """Random polarity and attenuation.

    Args:
        phase_flip_probability: of turning the waveform upside down, which no ear hears.
        max_attenuation_db: a gain uniform in [-max_attenuation_db, 0] dB.
    """

    phase_flip_probability: float = 0.5
    max_attenuation_db: float = 6.0

    def __call__(self, audio: Tensor, generator: np.random.Generator) -> Tensor:
        flip, attenuation = generator.random(2)
        gain = decibels_to_gain(-attenuation * self.max_attenuation_db)
        return audio * (-gain if flip < self.phase_flip_probability else gain)


def crop_start(length: int, crop_length: int, generator: np.random.Generator | None) -> int:
    """Where a crop of `crop_length` out of `length` starts: anywhere, or at 0 without a generator."""
    room = length - crop_length
    return 0 if generator is None or room <= 0 else int(generator.integers(room + 1))


def decibels_to_gain(decibels: float) -> float:
    """20 dB are a factor of 10."""
    return math.pow(10.0, decibels / 20.0)
