"""Faults that were made, each at a known amount, and that nothing else is found in their places."""

import numpy as np
import pytest

from foley.core.rates import resample
from foley.metrics.waveform import (
    clipped_runs,
    compare_channels,
    dc_offset,
    find_bandwidth,
    find_clicks,
    find_silence,
)

RATE = 24000
CLICKS = {"ends_ratio": 4.0, "inside_ratio": 12.0, "least_jump": 0.01}


def sine(frequency_hz=440.0, amplitude=0.5, seconds=1.0, phase=0.0, rate=RATE):
    """`[T, 1]`; a whole number of periods by itself."""
    time = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time + phase)).astype(np.float32)[:, None]


def noise(seconds=1.0, channels=1, seed=0, amplitude=0.1):
    samples = np.random.default_rng(seed).standard_normal((round(seconds * RATE), channels))
    return (amplitude * samples).astype(np.float32)


def stored(samples):
    """As 16 bits hold them."""
    return np.round(samples * 32768).clip(-32768, 32767).astype(np.float32) / 32768


# ---------------------------------------------------------------- clipping


def test_a_clipped_sine_has_a_run_for_each_half_period():
    assert clipped_runs(stored(sine(100, amplitude=2.0)), 3) == (200, 0)
    assert clipped_runs(3 * sine(100), 3) == (200, 0)  # beyond full scale, as floats hold it


def test_a_clipped_sine_that_was_made_quieter_has_flat_tops():
    assert clipped_runs(stored(0.3 * np.clip(sine(100, amplitude=2.0), -1, 1)), 3) == (0, 200)


@pytest.mark.parametrize("frequency_hz", [5, 20, 50, 440])
@pytest.mark.parametrize("amplitude", [0.002, 0.05, 0.99])
def test_the_round_tops_of_low_and_quiet_tones_are_not_flat(frequency_hz, amplitude):
    assert clipped_runs(stored(sine(frequency_hz, amplitude)), 3) == (0, 0)


def test_short_runs_do_not_count():
    samples = noise()
    samples[100:102] = 1.0
    assert clipped_runs(samples, 3) == (0, 0)
    assert clipped_runs(samples, 2) == (1, 0)


# ---------------------------------------------------------------- offset, clicks


def test_the_offset_is_the_mean_of_the_worst_channel():
    both = np.concatenate([sine() + 0.01, sine() - 0.25], axis=1)
    assert dc_offset(both) == pytest.approx(-0.25, abs=1e-6)


def test_a_tone_that_begins_at_its_top_clicks_at_the_start_alone():
    faded = sine(phase=np.pi / 2) * np.linspace(1, 0, RATE, dtype=np.float32)[:, None]
    found = find_clicks(faded, RATE, **CLICKS)
    assert (found.start, found.end, found.inside) == (True, False, 0)
    assert (found.start_jump, found.end_jump) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-4))
    back = find_clicks(faded[::-1], RATE, **CLICKS)
    assert (back.start, back.end, back.inside) == (False, True, 0)


def test_neither_a_tone_from_zero_nor_noise_from_its_midst_clicks():
    for clip in (sine(), noise(), np.zeros((RATE, 1), np.float32)):
        found = find_clicks(clip, RATE, **CLICKS)
        assert (found.start, found.end, found.inside) == (False, False, 0)


@pytest.mark.parametrize("places", [(1,), (5000,), (5000, 9000, 15001)])
def test_wrong_samples_and_cuts_inside_are_counted(places):
    wrong = sine()
    wrong[list(places)] += 0.8
    assert find_clicks(wrong, RATE, **CLICKS).inside == len(places)
    cut = np.concatenate([sine(), sine(phase=np.pi / 2)])  # from zero to the top
    assert find_clicks(cut, RATE, **CLICKS).inside == 1


def test_an_attack_and_a_jump_that_is_too_quiet_are_no_clicks():
    attack = np.concatenate([np.zeros((RATE, 1), np.float32), noise()])
    assert find_clicks(attack, RATE, **CLICKS).inside == 0
    wrong = sine()
    wrong[5000] += 0.004  # -42 dB of the peak
    assert find_clicks(wrong, RATE, **CLICKS).inside == 0


# ---------------------------------------------------------------- silence, bandwidth, channels


def test_silence_is_measured_to_the_sample_at_the_ends_and_by_frames_inside():
    gap = np.zeros((RATE // 2, 1), np.float32)
    clip = np.concatenate([gap, noise(), gap, noise(seed=1), gap[: RATE // 4]])
    found = find_silence(clip, RATE, level=1e-3)
    assert found.leading_seconds == pytest.approx(0.5, abs=1e-3)
    assert found.trailing_seconds == pytest.approx(0.25, abs=1e-3)
    assert found.share == pytest.approx(1.25 / 3.25, abs=0.01)
    nothing = find_silence(gap, RATE, level=1e-3)
    assert (nothing.share, nothing.leading_seconds, nothing.trailing_seconds) == (1.0, 0.5, 0.5)


def test_bandwidth_of_noise_and_of_a_tone():
    assert find_bandwidth(noise(4)[:, 0], RATE, 0.85).bandwidth_hz == pytest.approx(12000, rel=0.01)
    assert find_bandwidth(sine(3000)[:, 0], RATE, 0.85).bandwidth_hz == pytest.approx(3000, abs=30)


@pytest.mark.parametrize("from_hz", [8000, 12000, 16000])
def test_noise_that_was_upsampled_ends_at_half_its_old_rate(from_hz):
    upsampled = stored(resample(noise(4)[: 4 * from_hz, 0], from_hz, RATE))
    found = find_bandwidth(upsampled, RATE, 0.85)
    assert found.bandwidth_hz == pytest.approx(from_hz / 2, rel=0.05)  # the slope of the low-pass
    assert found.cutoff_hz == from_hz / 2
    assert found.cutoff_drop_db > 60


@pytest.mark.parametrize("clip", [noise(4), sine(3900), np.cumsum(noise(4), axis=0)])
def test_what_was_not_upsampled_has_no_cliff(clip):
    assert find_bandwidth(clip[:, 0], RATE, 0.85).cutoff_drop_db < 30


def test_correlation_is_one_minus_one_and_nought():
    mono, other = noise(), noise(seed=1)
    assert compare_channels(np.hstack([mono, 0.3 * mono])).correlation == pytest.approx(1.0)
    assert compare_channels(np.hstack([mono, -mono])).correlation == pytest.approx(-1.0)
    assert compare_channels(np.hstack([mono, other])).correlation == pytest.approx(0.0, abs=0.03)
    assert compare_channels(mono).correlation is None


def test_silent_channels_are_counted_and_not_compared():
    found = compare_channels(np.hstack([noise(), np.zeros((RATE, 1), np.float32)]))
    assert (found.silent, found.correlation) == (1, None)
