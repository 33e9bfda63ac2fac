"""Loudness by closed forms of BS.1770, and the gain to a loudness."""

import math

import numpy as np
import pytest

from foley.metrics.loudness import SHORTEST_SECONDS, integrated_loudness, level_to, true_peak

RATE = 48000


def sine(frequency_hz=997.0, amplitude=1.0, seconds=2.0, rate=RATE, phase=0.0):
    """`[T, 1]`."""
    time = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time + phase)).astype(np.float32)[:, None]


@pytest.mark.parametrize("rate", [16000, 24000, 44100, RATE, 96000])
@pytest.mark.parametrize("amplitude_db", [0, -20, -40])
def test_a_sine_of_997_hz_has_the_loudness_of_the_standard(rate, amplitude_db):
    tone = sine(amplitude=10 ** (amplitude_db / 20), rate=rate)
    assert integrated_loudness(tone, rate) == pytest.approx(-3.01 + amplitude_db, abs=0.1)


def test_the_same_in_two_channels_is_three_decibels_louder():
    assert integrated_loudness(np.repeat(sine(), 2, axis=1), RATE) == pytest.approx(0.0, abs=0.1)


def test_silence_around_a_sound_does_not_count():
    tone = sine(amplitude=0.1, seconds=4.0)
    padded = np.pad(tone, ((2 * RATE, 2 * RATE), (0, 0)))
    # Beside 37 blocks inside, three at each end hold a quarter to three quarters of the sound and pass the gate.
    lost = 10 * math.log10((37 + 2 * (0.25 + 0.5 + 0.75)) / (37 + 6))
    assert integrated_loudness(padded, RATE) == pytest.approx(integrated_loudness(tone, RATE) + lost, abs=0.02)


def test_what_has_no_loudness():
    assert integrated_loudness(sine(seconds=SHORTEST_SECONDS - 0.01), RATE) is None
    assert integrated_loudness(np.zeros((RATE, 1), np.float32), RATE) is None
    assert integrated_loudness(np.repeat(sine(), 6, axis=1), RATE) is None
    assert integrated_loudness(sine(seconds=SHORTEST_SECONDS), RATE) is not None


def test_a_rate_below_the_filters_is_measured_all_the_same():
    assert integrated_loudness(sine(500, rate=2000), 2000) == pytest.approx(
        integrated_loudness(sine(500), RATE), abs=0.1
    )


def test_the_true_peak_lies_between_samples():
    tone = sine(RATE / 4, phase=math.pi / 4) * np.hanning(2 * RATE)[:, None].astype(np.float32)
    assert np.abs(tone).max() == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert true_peak(tone, RATE) == pytest.approx(1.0, abs=1e-3)
    assert true_peak(tone, 700_000) == np.abs(tone).max()  # no room to oversample


@pytest.mark.parametrize("target_lufs", [-23.0, -30.0, -50.0])
def test_the_gain_brings_a_clip_to_the_loudness(target_lufs):
    noise = 0.05 * np.random.default_rng(0).standard_normal((RATE, 2)).astype(np.float32)
    levelling = level_to(noise, RATE, target_lufs, peak_ceiling=0.89)
    assert integrated_loudness(levelling.gain * noise, RATE) == pytest.approx(target_lufs, abs=0.01)
    assert (levelling.left, levelling.limited) == ("", False)


def test_the_true_peak_limits_the_gain():
    impulses = np.zeros((RATE, 1), np.float32)
    impulses[:: RATE // 10] = 0.1
    levelling = level_to(impulses, RATE, -10.0, peak_ceiling=0.5)
    assert levelling.limited
    assert true_peak(levelling.gain * impulses, RATE) == pytest.approx(0.5, abs=1e-4)
    assert levelling.to_json(-10.0)["limited_by_true_peak"] is True


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (sine(seconds=0.3), "shorter than 0.4 s"),
        (np.zeros((RATE, 1), np.float32), "silent"),
        (1e-4 * sine(amplitude=0.1), "without loudness"),
    ],
)
def test_what_cannot_be_measured_is_left_and_says_why(clip, reason):
    levelling = level_to(clip, RATE, -23.0, 0.89)
    assert levelling.gain == 1.0
    assert levelling.to_json(-23.0)["left"].startswith(reason)
