"""Sounds without a pitch: coloured noises, weather, machines, bangs."""

import numpy as np
from scipy.signal import fftconvolve

from foley.data.procedural.synthesis import (
    Canvas,
    Signal,
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


def white_noise(canvas: Canvas) -> Signal:
    """Equal power at every frequency."""
    return canvas.rng.standard_normal(canvas.samples)


def pink_noise(canvas: Canvas) -> Signal:
    """Power falls by 3 dB per octave."""
    return shaped_noise(canvas, lambda f: 1 / np.sqrt(np.maximum(f, 20)))


def brown_noise(canvas: Canvas) -> Signal:
    """Power falls by 6 dB per octave, down to the lowest audible frequencies."""
    return shaped_noise(canvas, lambda f: 1 / np.maximum(f, 50))


def _scatter(canvas: Canvas, rate_hz: float, kernel: Signal) -> Signal:
    """The kernel at many random times, sample-accurate, each with a random strength and sign."""
    onsets = (random_onsets(canvas, rate_hz) * canvas.sample_rate_hz).astype(np.intp)
    impulses = np.zeros(canvas.samples)
    strengths = canvas.rng.uniform(0.3, 1.0, onsets.size) * canvas.rng.choice([-1.0, 1.0], onsets.size)
    np.add.at(impulses, onsets, strengths)
    scattered: Signal = fftconvolve(impulses, kernel)[: canvas.samples]
    return scattered


def rain(canvas: Canvas, density_hz: float) -> Signal:
    """Patter: short bright drops, dense but separate, over a thin high hiss."""
    drop = canvas.part(0.012)
    patter = np.zeros(canvas.samples)
    for _ in range(3):
        kernel = shaped_noise(drop, bandpass(3500, 9500)) * decay(drop, 0.003, attack_seconds=0.0003)
        patter += _scatter(canvas, density_hz / 3, kernel)
    return patter + 0.08 * shaped_noise(canvas, bandpass(4000, 10000, order=2))


def wind(canvas: Canvas, pitch_hz: float) -> Signal:
    """A howl: one narrow band of noise whose centre and strength wander with the gusts."""
    centre_hz = pitch_hz * 2.0 ** (1.4 * smooth_random(canvas, 1.5) - 0.7)
    narrow = lowpass(pitch_hz * 0.1)
    band = shaped_noise(canvas, narrow) + 1j * shaped_noise(canvas, narrow)
    howl = (band * np.exp(2j * np.pi * cycles(canvas, centre_hz))).real
    gusts = 0.45 + 0.55 * smooth_random(canvas, 1.5)
    return gusts * (howl + 0.15 * shaped_noise(canvas, lowpass(300, order=1)))


def ocean_waves(canvas: Canvas, rate_hz: float) -> Signal:
    """Surf: noise that swells slowly, breaks bright and draws back."""
    position = (rate_hz * canvas.time + canvas.rng.random()) % 1.0
    swell = np.where(position < 0.55, (position / 0.55) ** 2.5, ((1 - position) / 0.45) ** 1.5)
    body, foam = shaped_noise(canvas, lowpass(700, order=1)), shaped_noise(canvas, bandpass(900, 6000, order=1))
    return (0.04 + swell) * body + 1.2 * swell**2 * foam


def thunder(canvas: Canvas, rate_hz: float) -> Signal:
    """Rolling low rumble: several overlapping surges after each strike."""
    surges = regular_onsets(canvas, rate_hz)
    rolls = np.concatenate([surges, surges + canvas.rng.uniform(0.15, 0.35), surges + canvas.rng.uniform(0.4, 0.7)])
    tail = canvas.part(1.6)
    envelope = place(canvas, rolls, [decay(tail, 0.3, attack_seconds=0.04)], canvas.rng.uniform(0.5, 1.0, rolls.size))
    crack = place(canvas, surges, [decay(tail, 0.06)])
    rumble = shaped_noise(canvas, bandpass(35, 160, order=2))
    return envelope * rumble + 0.5 * crack * shaped_noise(canvas, lowpass(900, order=1))


def explosion(canvas: Canvas) -> Signal:
    """A blast over the whole spectrum that darkens as it dies away, with a falling thump below."""
    blast = canvas.part(min(canvas.duration_seconds, 1.8))
    bright = shaped_noise(blast, lowpass(7000, order=1)) * decay(blast, 0.12)
    dark = shaped_noise(blast, lowpass(450, order=1)) * decay(blast, canvas.rng.uniform(0.35, 0.5))
    thump = sine(cycles(blast, 35 + 90 * np.exp(-blast.time / 0.1))) * decay(blast, 0.3)
    kernel = np.tanh(1.5 * bright + 1.5 * dark + 1.5 * thump)
    return place(canvas, regular_onsets(canvas, 0.5), [kernel])


def fire(canvas: Canvas, density_hz: float) -> Signal:
    """Crackle: sparse hard pops over a soft low roar."""
    pop = canvas.part(0.02)
    kernel = shaped_noise(pop, bandpass(500, 5000, order=1)) * decay(pop, 0.004, attack_seconds=0.0003)
    roar = shaped_noise(canvas, bandpass(60, 350, order=1)) * (0.6 + 0.4 * smooth_random(canvas, 4.0))
    return _scatter(canvas, density_hz, kernel) + 0.12 * roar


def engine(canvas: Canvas, rate_hz: float) -> Signal:
    """Combustion: a dull burst per firing, slightly uneven, so that it growls."""
    firing = canvas.part(0.06)
    tone = sine(cycles(firing, 85.0)) + 0.5 * sine(cycles(firing, 190.0))
    kernels = [
        (tone + 0.35 * shaped_noise(firing, bandpass(80, 900, order=2))) * decay(firing, 0.016, attack_seconds=0.003)
        for _ in range(8)
    ]
    onsets = regular_onsets(canvas, rate_hz, jitter=0.06)
    return place(canvas, onsets, kernels, canvas.rng.uniform(0.75, 1.0, onsets.size))


def helicopter(canvas: Canvas, rate_hz: float) -> Signal:
    """Rotor: strong slow chops of noise over a turbine's whine."""
    chop = pulses(cycles(canvas, rate_hz, start=canvas.rng.random()), duty=0.55, edge=0.2)
    wash = shaped_noise(canvas, bandpass(120, 1800, order=1))
    whine = sine(cycles(canvas, canvas.rng.uniform(2400, 2900)))
    return (0.06 + chop) * wash + 0.25 * whine
