"""The audit of files: each made fault is found, alone, and clean sounds have none."""

import numpy as np
import pytest
import soundfile

from foley.data.procedural import CLASS_NAMES, ProceduralDataset
from foley.metrics.audit import FINDINGS, AuditLimits, audit_files, findings, in_words, measure, sound_files
from foley.metrics.repeats import band_spectrum, correlate, find_repeats, loop_seconds

RATE = 24000
LIMITS = AuditLimits.shipped()
RNG = np.random.default_rng


def noise(seconds=1.0, channels=1, seed=0, amplitude=0.1):
    """`[T, channels]`, faded at both ends, as what is clean is."""
    samples = amplitude * RNG(seed).standard_normal((round(seconds * RATE), channels))
    ramp = np.minimum(1, np.arange(len(samples)) / 500)
    return (samples * (ramp * ramp[::-1])[:, None]).astype(np.float32)


def tone(phase=0.0, amplitude=0.3, frequency_hz=440):
    return (amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(RATE) / RATE + phase)).astype(np.float32)[:, None]


def low_passed(from_hz=8000):
    """Noise of the bands that the lower rate has, without a trace of others."""
    spectrum = np.fft.rfft(noise(2)[:, 0])
    spectrum[np.fft.rfftfreq(2 * RATE, 1 / RATE) > from_hz / 2] = 0
    return (np.fft.irfft(spectrum)[:, None] * np.hanning(2 * RATE)[:, None]).astype(np.float32)


def spiked():
    samples = tone()
    samples[9000] = 0.9
    return samples


def between_samples():
    """A burst at a quarter of the rate, sampled 45 degrees beside its peaks: 3 dB higher between samples."""
    samples = noise(2, amplitude=0.01)
    burst = 1.3 * np.sin(np.pi / 2 * np.arange(2400) + np.pi / 4) * np.hanning(2400)
    samples[9000 : 9000 + len(burst), 0] += burst.astype(np.float32)
    return samples


SILENCE = np.zeros((RATE, 1), np.float32)
MADE = {
    "silent": SILENCE + 1e-5,
    "clipping": 0.3 * np.clip(tone(amplitude=4.0), -1, 1),
    "click_start": tone(np.pi / 2) * np.linspace(1, 0, RATE, dtype=np.float32)[:, None],
    "click_end": (tone(np.pi / 2) * np.linspace(1, 0, RATE, dtype=np.float32)[:, None])[::-1],
    "click_inside": spiked(),
    "dc_offset": noise() + 0.03 * np.hanning(RATE).astype(np.float32)[:, None] * 2,
    "true_peak": between_samples(),
    "antiphase": noise() * np.array([[1, -1]], np.float32),
    "silent_channel": noise() * np.array([[1, 0]], np.float32),
    "band_limited": low_passed(),
    "loop": np.tile(noise(0.5), (4, 1)),
    "leading_silence": np.concatenate([SILENCE, SILENCE[:2400], noise(2)]),
    "trailing_silence": np.concatenate([noise(2), SILENCE, SILENCE, SILENCE[:2400]]),
    "mostly_silent": np.concatenate([SILENCE[:20000], noise(0.3), SILENCE[:20000]]),
    "mono_as_stereo": noise() * np.array([[1, 0.5]], np.float32),
    "too_quiet": 1e-3 * noise(2, amplitude=0.5),
    "too_loud": tone(amplitude=0.95, frequency_hz=2500),
}


def test_every_finding_has_a_made_fault_or_is_of_files():
    assert set(FINDINGS) - set(MADE) == {"unreadable", "not_finite", "repeat"}


@pytest.mark.parametrize("fault", MADE)
def test_a_made_fault_is_found_alone(fault):
    assert findings(measure(MADE[fault], RATE, LIMITS), LIMITS) == (fault,)


@pytest.mark.parametrize("clip", [noise(), noise(channels=2), tone(), 0.5 * tone() + noise(amplitude=0.01)])
def test_clean_clips_have_no_findings(clip):
    assert findings(measure(clip, RATE, LIMITS), LIMITS) == ()


EXPLAINED = {
    "band_limited": {"siren", "birds", "rising sweep", "falling sweep", "hum"},  # nothing lies above their partials
    "click_inside": {"laser", "drum"},  # square waves, and hits that end at once
    "loop": {"alarm", "heartbeat", "whistle", "metronome", "crickets", "drum", "laser", "clock", "telephone"},
    "true_peak": {"explosion", "dog bark", "laser"},  # noise at a sample peak of -1 dBFS
    "mostly_silent": {"clock", "metronome"},
    "too_loud": {"rising sweep", "falling sweep"},
}
"""What procedural classes are by their synthesis: tones with an end, periods that are equal to the sample."""


def test_procedural_clips_have_none_but_what_their_synthesis_explains():
    clips = ProceduralDataset(2 * len(CLASS_NAMES), 1234, 2.0, 24000)
    found = {name: set() for name in EXPLAINED}
    for item in map(clips.render, range(len(clips))):
        samples = item.audio.numpy().astype(np.float32)[:, None]
        for name in findings(measure(samples, clips.sample_rate_hz, LIMITS), LIMITS):
            found.setdefault(name, set()).add(item.label)
    assert set(found) == set(EXPLAINED)
    assert {name: labels - EXPLAINED[name] for name, labels in found.items() if labels - EXPLAINED[name]} == {}


# ---------------------------------------------------------------- repeats and loops


def test_a_loop_has_its_period_and_a_tone_and_noise_have_none():
    assert loop_seconds(np.tile(noise(0.25)[:, 0], 6), RATE, 0.98, 0.1) == pytest.approx(0.25, abs=1e-4)
    assert loop_seconds(tone()[:, 0], RATE, 0.98, 0.1) is None
    assert loop_seconds(noise()[:, 0], RATE, 0.98, 0.1) is None
    assert loop_seconds(np.tile(noise(0.6)[:, 0], 2)[:RATE], RATE, 0.98, 0.1) is None  # not twice


def test_what_is_mixed_into_a_copy_is_its_correlation():
    one, other = noise(4, seed=0)[:, 0], noise(4, seed=1)[:, 0]
    alike, shift = correlate(one, RATE, one + other, RATE)
    assert (alike, shift) == (pytest.approx(0.5**0.5, abs=0.02), 0.0)
    assert correlate(one, RATE, other, RATE)[0] < 0.1


@pytest.mark.parametrize("copies", [2, 7, 40])
def test_a_sound_is_found_in_any_number_of_copies(copies):
    gains = RNG(1).permutation(copies) + 1  # whose spectra differ by rounding, so that not the first ones are nearest
    clips = [(noise()[:, 0] * np.float32(gain / copies), RATE) for gain in gains]
    clips.insert(1, (noise(seed=2)[:, 0], RATE))
    repeats = find_repeats([band_spectrum(*clip) for clip in clips], clips.__getitem__, 0.98)
    assert set(repeats) == set(range(2, copies + 1))
    assert all(repeat.of < place and repeat.of != 1 for place, repeat in repeats.items())


@pytest.fixture
def folder(tmp_path):
    """Two sounds; copies of the first: the same, quieter and upside down, later and cut; files of no use."""
    first, second = noise(2, seed=0), noise(2, seed=1)
    shifted = np.concatenate([SILENCE[: RATE // 4], first])[: 2 * RATE]
    clips = {"a": first, "b": second, "c": first, "d": -0.25 * first, "e": shifted, "f": first * np.nan}
    for name, samples in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE, "FLOAT")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "g.wav").write_bytes(b"no sound")
    (tmp_path / "h.m4a").write_bytes(b"of a format that is not decoded")
    (tmp_path / "notes.txt").write_text("left alone")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_repeats_and_files_of_no_use_are_found_in_a_folder(folder, num_workers):
    audit = audit_files(sound_files(folder), LIMITS, folder, num_workers)
    found = {clip.name: clip.findings for clip in audit.clips}
    assert found == {
        "a.wav": (),
        "b.wav": (),
        "below/g.wav": ("unreadable",),
        "c.wav": ("repeat",),
        "d.wav": ("repeat",),
        "e.wav": ("repeat",),
        "f.wav": ("not_finite",),
        "h.m4a": ("unreadable",),
    }
    repeats = {clip.name: clip.measured["repeat"] for clip in audit.clips if "repeat" in clip.findings}
    assert {repeat["of"] for repeat in repeats.values()} <= {"a.wav", "c.wav", "d.wav"}
    assert repeats["e.wav"]["shift_seconds"] == 0.25
    assert audit.counts == {"unreadable": 2, "not_finite": 1, "repeat": 3}
    assert [clip.findings[0] for clip in audit.worst(4)] == ["unreadable", "unreadable", "not_finite", "repeat"]
    assert in_words(audit.summary()) == "audit: 6 of 8 clips have findings (2 unreadable, 1 not_finite, 3 repeat)"


def test_of_a_longer_file_the_beginning_is_heard(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.concatenate([noise(1), tone(np.pi / 2)]), RATE, "FLOAT")
    (clip,) = audit_files([tmp_path / "long.wav"], LIMITS, longest_seconds=0.5).clips
    assert clip.findings == ()  # its end is not that of the file
    assert (clip.measured["heard"], clip.measured["duration_seconds"]) == ("its beginning", 0.5)


def test_limits_that_are_none_are_refused_by_name():
    with pytest.raises(ValueError, match=r"limits\.silent_share=2: give a number >= 0 and <= 1"):
        AuditLimits(**{**vars(LIMITS), "silent_share": 2})


def test_a_folder_without_sounds_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no sound"):
        sound_files(tmp_path)
