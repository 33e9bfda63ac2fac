"""Sounds without a pitch: coloured noises, weather, machines, bangs."""

import numpy as np
from scipy.signal import fftconvolve

from foley.data.procedural.synthesis import (
    Signal,
    Timeline,
    bandpass,
    cycles,
    decay,
    lowpass,
    place,
    pulses,
    random_onsets,
    regular_onsets,
    shaped_noise,
    sine,
    smooth_random,
)


def white_noise(timeline: Timeline) -> Signal:
    """Equal power at every frequency."""
    return timeline.rng.standard_normal(timeline.samples)


def pink_noise(timeline: Timeline) -> Signal:
    """Power falls by 3 dB per octave."""
    return shaped_noise(timeline, lambda f: 1 / np.sqrt(np.maximum(f, 20)))


def brown_noise(timeline: Timeline) -> Signal:
    """Power falls by 6 dB per octave, down to the lowest audible frequencies."""
    return shaped_noise(timeline, lambda f: 1 / np.maximum(f, 50))


def _scatter(timeline: Timeline, rate_hz: float, kernel: Signal) -> Signal:
    """The kernel at many random times, sample-accurate, each with a random strength and sign."""
    onsets = (random_onsets(timeline, rate_hz) * timeline.sample_rate_hz).astype(np.intp)
    impulses = np.zeros(timeline.samples)
    strengths = timeline.rng.uniform(0.3, 1.0, onsets.size) * timeline.rng.choice([-1.0, 1.0], onsets.size)
    np.add.at(impulses, onsets, strengths)
    scattered: Signal = fftconvolve(impulses, kernel)[: timeline.samples]
    return scattered


def rain(timeline: Timeline, density_hz: float) -> Signal:
    """Patter: short bright drops, dense but separate, over a thin high hiss."""
    drop = timeline.part(0.012)
    patter = np.zeros(timeline.samples)
    for _ in range(3):
        kernel = shaped_noise(drop, bandpass(3500, 9500)) * decay(drop, 0.003, attack_seconds=0.0003)
        patter += _scatter(timeline, density_hz / 3, kernel)
    return patter + 0.08 * shaped_noise(timeline, bandpass(4000, 10000, order=2))


def wind(timeline: Timeline, pitch_hz: float) -> Signal:
    """A howl: one narrow band of noise whose centre and strength wander with the gusts."""
    centre_hz = pitch_hz * 2.0 ** (1.4 * smooth_random(timeline, 1.5) - 0.7)
    narrow = lowpass(pitch_hz * 0.1)
    band = shaped_noise(timeline, narrow) + 1j * shaped_noise(timeline, narrow)
    howl = (band * np.exp(2j * np.pi * cycles(timeline, centre_hz))).real
    gusts = 0.45 + 0.55 * smooth_random(timeline, 1.5)
    return gusts * (howl + 0.15 * shaped_noise(timeline, lowpass(300, order=1)))


def ocean_waves(timeline: Timeline, rate_hz: float) -> Signal:
    """Surf: noise that swells slowly, breaks bright and draws back."""
    position = (rate_hz * timeline.time + timeline.rng.random()) % 1.0
    swell = np.where(position < 0.55, (position / 0.55) ** 2.5, ((1 - position) / 0.45) ** 1.5)
    body, foam = shaped_noise(timeline, lowpass(700, order=1)), shaped_noise(timeline, bandpass(900, 6000, order=1))
    return (0.04 + swell) * body + 1.2 * swell**2 * foam


def thunder(timeline: Timeline, rate_hz: float) -> Signal:
    """Rolling low rumble: several overlapping surges after each strike."""
    surges = regular_onsets(timeline, rate_hz)
    rolls = np.concatenate([surges, surges + timeline.rng.uniform(0.15, 0.35), surges + timeline.rng.uniform(0.4, 0.7)])
    tail = timeline.part(1.6)
    loudness = timeline.rng.uniform(0.5, 1.0, rolls.size)
    envelope = place(timeline, rolls, [decay(tail, 0.3, attack_seconds=0.04)], loudness)
    crack = place(timeline, surges, [decay(tail, 0.06)])
    rumble = shaped_noise(timeline, bandpass(35, 160, order=2))
    return envelope * rumble + 0.5 * crack * shaped_noise(timeline, lowpass(900, order=1))


def explosion(timeline: Timeline) -> Signal:
    """A blast over the whole spectrum that darkens as it dies away, with a falling thump below."""
    blast = timeline.part(min(timeline.duration_seconds, 1.8))
    bright = shaped_noise(blast, lowpass(7000, order=1)) * decay(blast, 0.12)
    dark = shaped_noise(blast, lowpass(450, order=1)) * decay(blast, timeline.rng.uniform(0.35, 0.5))
    thump = sine(cycles(blast, 35 + 90 * np.exp(-blast.time / 0.1))) * decay(blast, 0.3)
    kernel = np.tanh(1.5 * bright + 1.5 * dark + 1.5 * thump)
    return place(timeline, regular_onsets(timeline, 0.5), [kernel])


def fire(timeline: Timeline, density_hz: float) -> Signal:
    """Crackle: sparse hard pops over a soft low roar."""
    pop = timeline.part(0.02)
    kernel = shaped_noise(pop, bandpass(500, 5000, order=1)) * decay(pop, 0.004, attack_seconds=0.0003)
    roar = shaped_noise(timeline, bandpass(60, 350, order=1)) * (0.6 + 0.4 * smooth_random(timeline, 4.0))
    return _scatter(timeline, density_hz, kernel) + 0.12 * roar


def engine(timeline: Timeline, rate_hz: float) -> Signal:
    """Combustion: a dull burst per firing, slightly uneven, so that it growls."""
    firing = timeline.part(0.06)
    tone = sine(cycles(firing, 85.0)) + 0.5 * sine(cycles(firing, 190.0))
    kernels = [
        (tone + 0.35 * shaped_noise(firing, bandpass(80, 900, order=2))) * decay(firing, 0.016, attack_seconds=0.003)
        for _ in range(8)
    ]
    onsets = regular_onsets(timeline, rate_hz, jitter=0.06)
    return place(timeline, onsets, kernels, timeline.rng.uniform(0.75, 1.0, onsets.size))


def helicopter(timeline: Timeline, rate_hz: float) -> Signal:
    """Rotor: strong slow chops of noise over a turbine's whine."""
    chop = pulses(cycles(timeline, rate_hz, start=timeline.rng.random()), duty=0.55, edge=0.2)
    wash = shaped_noise(timeline, bandpass(120, 1800, order=1))
    whine = sine(cycles(timeline, timeline.rng.uniform(2400, 2900)))
    return (0.06 + chop) * wash + 0.25 * whine
