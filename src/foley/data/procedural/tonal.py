"""Sounds with a pitch: tones, sweeps, sirens, hums."""

import numpy as np

from foley.data.procedural.synthesis import (
    Signal,
    Timeline,
    cycles,
    decay,
    harmonics,
    place,
    pulses,
    regular_onsets,
    shaped_noise,
    sine,
)


def pure_tone(timeline: Timeline, pitch_hz: float) -> Signal:
    """One steady sine."""
    return sine(cycles(timeline, pitch_hz, start=timeline.rng.random()))


def chord(timeline: Timeline, pitch_hz: float) -> Signal:
    """An organ-like major or minor triad."""
    third = 1.25 if timeline.rng.random() < 0.5 else 1.2
    stops = np.array([1.0, 0.6, 0.3, 0.4, 0.0, 0.0, 0.0, 0.2])
    return sum((harmonics(timeline, pitch_hz * ratio, stops) for ratio in (1, third, 1.5)), np.zeros(timeline.samples))


def _sweep(timeline: Timeline, rate_hz: float, rising: bool) -> Signal:
    """Exponential sweeps over three octaves, one after the other, with a short fade between them."""
    position = (rate_hz * timeline.time) % 1.0
    lowest_hz = timeline.rng.uniform(250, 450)
    phase = cycles(timeline, lowest_hz * 8.0 ** (position if rising else 1 - position))
    return sine(phase) * pulses(position, duty=1.0, edge=0.03)


def rising_sweep(timeline: Timeline, rate_hz: float) -> Signal:
    """Sine sweeps from low to high."""
    return _sweep(timeline, rate_hz, rising=True)


def falling_sweep(timeline: Timeline, rate_hz: float) -> Signal:
    """Sine sweeps from high to low."""
    return _sweep(timeline, rate_hz, rising=False)


def siren(timeline: Timeline, rate_hz: float) -> Signal:
    """A reedy tone that wails up and down without a break."""
    swing = 0.5 - 0.5 * np.cos(2 * np.pi * (rate_hz * timeline.time + timeline.rng.random()))
    return harmonics(timeline, 550 * 2.3**swing, np.arange(1.0, 8.0) ** -1)


def alarm(timeline: Timeline, pitch_hz: float, rate_hz: float) -> Signal:
    """Electronic beeps, half on, half off."""
    gate = pulses(cycles(timeline, rate_hz), duty=0.5, edge=0.03)
    return gate * harmonics(timeline, pitch_hz, np.array([1.0, 0.0, 0.4]))


def telephone(timeline: Timeline, pitch_hz: float) -> Signal:
    """A trill between two pitches, 18 times a second, in bursts."""
    warble = np.where(cycles(timeline, 18.0) % 1.0 < 0.5, 1.0, 1.26)
    gate = pulses(cycles(timeline, 1.2), duty=0.62, edge=0.02)
    return gate * harmonics(timeline, pitch_hz * warble, np.array([1.0, 0.5, 0.35, 0.25, 0.15]))


def whistle(timeline: Timeline, pitch_hz: float) -> Signal:
    """A breathy note with a wide vibrato."""
    vibrato = 1 + 0.07 * np.sin(2 * np.pi * (timeline.rng.uniform(4.5, 6.0) * timeline.time + timeline.rng.random()))
    breath = shaped_noise(timeline, lambda f: 1 / (1 + ((f - pitch_hz) / 300) ** 2))
    return sine(cycles(timeline, pitch_hz * vibrato)) + 0.08 * breath


def electric_hum(timeline: Timeline, pitch_hz: float) -> Signal:
    """A steady buzz of many even harmonics of the mains."""
    amplitudes = np.arange(1.0, 31.0) ** -0.8
    return harmonics(timeline, pitch_hz, amplitudes)


def laser(timeline: Timeline, rate_hz: float) -> Signal:
    """Zaps: each falls from the top of the spectrum within a sixth of a second."""
    zap = timeline.part(min(0.22, 0.85 / rate_hz))
    top_hz = timeline.rng.uniform(5500, 8000)
    phase = cycles(zap, 150 + top_hz * np.exp(-zap.time / 0.045))
    kernel = (sine(phase) + 0.3 * np.sign(sine(phase))) * decay(zap, 0.11)
    return place(timeline, regular_onsets(timeline, rate_hz), [kernel])


def bell(timeline: Timeline, pitch_hz: float, rate_hz: float) -> Signal:
    """A church bell: inharmonic partials, of which the high ones die first."""
    ring = timeline.part(min(timeline.duration_seconds, 2.0))
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 3.01, 4.17, 5.43])
    strengths = np.array([0.6, 1.0, 0.7, 0.4, 0.9, 0.4, 0.35, 0.3, 0.2])
    partials = zip(ratios, strengths, strict=True)
    kernel = sum(
        (s * sine(pitch_hz * r * ring.time) * decay(ring, 0.9 / (0.5 + r / 2)) for r, s in partials),
        np.zeros(ring.samples),
    )
    return place(timeline, regular_onsets(timeline, rate_hz), [kernel])
