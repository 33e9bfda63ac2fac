"""Sounds made of separate events: ticks, knocks, drops, animals."""

import numpy as np

from foley.data.procedural.synthesis import (
    Signal,
    Timeline,
    bandpass,
    cycles,
    decay,
    harmonics,
    lowpass,
    place,
    pulses,
    random_onsets,
    regular_onsets,
    shaped_noise,
    sine,
)


def metronome(timeline: Timeline, rate_hz: float) -> Signal:
    """Wooden clicks at a steady beat."""
    click = timeline.part(0.12)
    pitch_hz = timeline.rng.uniform(950, 1300)
    kernel = (sine(pitch_hz * click.time) + 0.5 * sine(2.7 * pitch_hz * click.time)) * decay(click, 0.018)
    return place(timeline, regular_onsets(timeline, rate_hz), [kernel])


def clock(timeline: Timeline, rate_hz: float) -> Signal:
    """Tick, tock: very short, thin and bright, alternating between two heights."""
    beat = timeline.part(0.05)
    tick = shaped_noise(beat, bandpass(6000, 9500)) * decay(beat, 0.007, attack_seconds=0.0005)
    tock = shaped_noise(beat, bandpass(2600, 4200)) * decay(beat, 0.009, attack_seconds=0.0005)
    return place(timeline, regular_onsets(timeline, rate_hz), [tick, tock])


def heartbeat(timeline: Timeline, rate_hz: float) -> Signal:
    """Lub-dub: two muffled thumps per beat, the second weaker and higher."""
    thump = timeline.part(0.25)
    lub = sine(cycles(thump, 45 + 30 * np.exp(-thump.time / 0.03))) * decay(thump, 0.05, attack_seconds=0.01)
    dub = sine(cycles(thump, 60 + 40 * np.exp(-thump.time / 0.03))) * decay(thump, 0.035, attack_seconds=0.01)
    beats = regular_onsets(timeline, rate_hz)
    return place(timeline, beats, [lub]) + 0.7 * place(timeline, beats + 0.33 / rate_hz, [dub])


def drum(timeline: Timeline, rate_hz: float) -> Signal:
    """A beat of kick and snare with a hi-hat between them."""
    hit = timeline.part(0.3)
    kick = sine(cycles(hit, 50 + 130 * np.exp(-hit.time / 0.025))) * decay(hit, 0.09)
    rattle = shaped_noise(hit, bandpass(900, 7000, order=1)) * decay(hit, 0.06)
    snare = 0.6 * rattle + 0.6 * sine(190 * hit.time) * decay(hit, 0.05)
    hat = shaped_noise(hit, bandpass(8000, 11000)) * decay(hit, 0.02)
    beats = regular_onsets(timeline, rate_hz)
    return place(timeline, beats, [kick, snare]) + 0.3 * place(timeline, beats + 0.5 / rate_hz, [hat])


def footsteps(timeline: Timeline, rate_hz: float) -> Signal:
    """Steps on gravel: heel thud, then a crunch that rolls on to the toe."""
    step = timeline.part(0.28)
    thud = sine(110 * step.time) * decay(step, 0.03)
    kernels = []
    for _ in range(3):
        grains = shaped_noise(step, bandpass(1200, 4500, order=2)) * shaped_noise(step, lowpass(60)) ** 2
        rolling = np.exp(-(((step.time - 0.1) / 0.055) ** 2))
        kernels.append(0.7 * thud + 0.45 * np.tanh(grains) * rolling)
    return place(timeline, regular_onsets(timeline, rate_hz, jitter=0.04), kernels)


def water_drops(timeline: Timeline, rate_hz: float) -> Signal:
    """Drips into water: each bubble's pitch jumps up as it closes, and echoes."""
    drip = timeline.part(0.09)
    kernels = []
    for pitch_hz in timeline.rng.uniform(700, 1500, 5):
        kernels.append(sine(cycles(drip, pitch_hz * (1 + 14 * drip.time))) * decay(drip, 0.028))
    onsets = regular_onsets(timeline, rate_hz, jitter=0.3)
    return place(timeline, onsets, kernels) + 0.3 * place(timeline, onsets + 0.13, kernels)


def crickets(timeline: Timeline, pitch_hz: float, rate_hz: float) -> Signal:
    """Chirps of a few quick pulses of one high tone."""
    pulse = pulses(cycles(timeline, 32.0), duty=0.6, edge=0.15)
    chirp = pulses(cycles(timeline, rate_hz, start=timeline.rng.random()), duty=0.5, edge=0.02)
    return pulse * chirp * sine(cycles(timeline, pitch_hz)) + 0.004 * timeline.rng.standard_normal(timeline.samples)


def birds(timeline: Timeline, pitch_hz: float, rate_hz: float) -> Signal:
    """Song: short whistled notes that bend up, down or over, no two neighbours alike."""
    note = timeline.part(0.13)
    shape, kernels = note.time / 0.13, []
    for kind, offset in zip(timeline.rng.permutation(6) % 3, timeline.rng.uniform(-0.3, 0.3, 6), strict=True):
        bend = (shape, 1 - shape, np.sin(np.pi * shape))[kind]
        contour = pitch_hz * 2.0 ** (offset + 0.9 * (bend - 0.5))
        kernels.append(sine(cycles(note, contour)) * np.sin(np.pi * shape))
    return place(timeline, regular_onsets(timeline, rate_hz, jitter=0.12), kernels)


def dog_bark(timeline: Timeline, pitch_hz: float, rate_hz: float) -> Signal:
    """Barks: a harmonic, throaty burst whose pitch rises and falls."""
    bark = timeline.part(0.2)
    arch = np.sin(np.pi * bark.time / 0.2)
    formants = np.array([0.5, 1.0, 0.9, 0.6, 0.5, 0.35, 0.25, 0.2, 0.12, 0.08])
    voice = harmonics(bark, pitch_hz * (0.7 + 0.5 * arch), formants)
    throat = shaped_noise(bark, bandpass(500, 2500, order=1))
    kernel = np.tanh(voice + 0.5 * throat) * arch**0.7
    return place(timeline, regular_onsets(timeline, rate_hz, jitter=0.08), [kernel])


def glass_break(timeline: Timeline, rate_hz: float) -> Signal:
    """A bright crash, then shards: many short high rings."""
    crash = timeline.part(0.25)
    burst = shaped_noise(crash, bandpass(2500, 11000, order=2)) * decay(crash, 0.03)
    crashes = regular_onsets(timeline, rate_hz)
    total = 0.8 * place(timeline, crashes, [burst])
    shard = timeline.part(0.16)
    pitches_hz = timeline.rng.uniform(3000, 9500, 12)
    rings = [sine(pitch_hz * shard.time) * decay(shard, 0.035, attack_seconds=0.001) for pitch_hz in pitches_hz]
    for onset in crashes:
        fall = onset + random_onsets(timeline.part(0.7), 40.0) ** 1.3
        loudness = timeline.rng.uniform(0.2, 0.7, fall.size)
        total += place(timeline, fall[fall < timeline.duration_seconds], rings, loudness)
    return total
