from math import ceil, pi

import numpy as np
import pytest
import soundfile

from foley.data.audio import AudioError, read_audio, resample
from foley.data.manifest import ManifestEntry, preflight

RATE = 24000


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 44057])
def test_resampling_keeps_a_tone(rate):
    tone = np.sin(2 * pi * 440 * np.arange(rate // 2) / rate).astype(np.float32)
    resampled = resample(tone, rate, RATE)
    expected = np.sin(2 * pi * 440 * np.arange(len(resampled)) / RATE)
    assert len(resampled) == ceil(len(tone) * RATE / rate)
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=1e-3)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    tone = np.sin(2 * pi * 15000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(resample(tone, 48000, RATE)[500:-500]).max() < 1e-3


def test_six_channels_are_averaged(tmp_path):
    samples = np.linspace(-0.5, 0.5, 600, dtype=np.float32).reshape(100, 6)
    soundfile.write(tmp_path / "surround.wav", samples, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "surround.wav", RATE), samples.mean(1), atol=1e-7)


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("low.wav", 8000, {}),
        ("double.wav", RATE, {"subtype": "DOUBLE"}),
        ("mp3_named.wav", RATE, {"format": "MP3"}),
        ("vorbis.ogg", 44100, {}),
        ("lossless.flac", 96000, {}),
    ],
)
def test_rates_and_formats(name, rate, options, write_clip):
    audio = read_audio(write_clip(name, rate // 10, rate, 2, **options), RATE)
    assert audio.dtype == np.float32
    assert len(audio) == 2400


def test_only_the_beginning_is_read_where_asked(write_clip):
    path = write_clip("long.wav", RATE)
    np.testing.assert_array_equal(read_audio(path, RATE, 0.25), read_audio(path, RATE)[: RATE // 4])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e29, -17.0, 1e300])
def test_samples_that_no_recording_holds_are_rejected(value, tmp_path):
    samples = np.zeros(100)
    samples[50] = value
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="DOUBLE")
    with pytest.raises(AudioError, match=r"bad\.wav: holds"):
        read_audio(tmp_path / "bad.wav", RATE)


def _faulty_files(folder, write_clip):
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio at all, whatever its name says")
    soundfile.write(folder / "headed.wav", np.zeros(0), RATE)
    for name in ("cut.wav", "cut.flac", "cut.ogg", "cut.mp3", "cut.aiff"):
        path = write_clip(name, RATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return ["missing.wav", "empty.wav", "text.wav", "headed.wav"] + [
        f"cut.{s}" for s in ("wav", "flac", "ogg", "mp3", "aiff")
    ]


def test_preflight_lists_every_faulty_file_and_reading_refuses_it(tmp_path, write_clip):
    write_clip("good.wav")
    faulty = _faulty_files(tmp_path, write_clip)
    entries = [ManifestEntry(tmp_path / name, "x", name, None) for name in ["good.wav", *faulty]]
    assert [fault.entry.id for fault in preflight(entries, decode=True)] == faulty
    assert {fault.entry.id for fault in preflight(entries)} >= set(faulty) - {"cut.mp3", "cut.flac"}
    for name in faulty:
        with pytest.raises(AudioError, match=name):
            read_audio(tmp_path / name, RATE)


def test_a_clip_shorter_than_its_manifest_says_is_truncated(write_clip):
    path = write_clip("short.flac", RATE)
    read_audio(path, RATE, expected_seconds=1.05)
    with pytest.raises(AudioError, match=r"truncated: it holds 1\.000 of 1\.500 s"):
        read_audio(path, RATE, expected_seconds=1.5)
    assert len(preflight([ManifestEntry(path, "x", "x", 1.5)])) == 1


def test_a_streamed_file_that_does_not_know_its_length_is_read(write_clip):
    path = write_clip("streamed.wav")
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_audio(path, RATE)) == 2400


def test_preflight_passes_the_shared_clips(shared):
    from foley.data.manifest import read_manifest

    assert preflight(read_manifest(shared / "data" / "clips.jsonl")[::20], decode=True) == []
