from math import ceil, pi
from pathlib import Path

import numpy as np
import pytest
import soundfile

from foley.core.channels import LossyMixes, first_heard, loss_of_mean, lossy_mixes
from foley.core.rates import resample
from foley.data import audio as audio_files
from foley.data.audio import AudioError, decode, open_audio, read_audio
from foley.data.importers.annotations import AnnotationFile
from foley.data.manifest import ManifestEntry, ManifestError
from foley.data.preflight import preflight
from foley.data.preparation import prepare_manifest
from foley.data.splits import ClipSource

RATE = 24000
READ = soundfile.SoundFile.read


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


@pytest.fixture
def cases(shared):
    folder = shared / "cases" / "audio"
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    return folder


DAMAGED = {
    "flac_declares_20_gib.flac": "declares 2717909184 samples in 78348 bytes",
    "flac_declares_too_many_frames.flac": "declares a rate of 904640 Hz",
    "rate_bit_24_flipped.wav": "declares a rate of 16821316 Hz",
}


@pytest.mark.parametrize(("name", "message"), DAMAGED.items())
def test_a_header_that_cannot_be_true_is_refused_before_anything_is_read(cases, name, message):
    for look in (open_audio, lambda path: read_audio(path, RATE)):
        with pytest.raises(AudioError, match=f"{name}: {message}"):
            look(cases / name)


def test_preparation_leaves_out_damaged_headers_and_counts_them(cases, tmp_path):
    rows = [
        (line, {"id": name, "names": [name.partition(".")[0]], "caption": "a sound", "license": "cc0"})
        for line, name in enumerate([*DAMAGED, "twelve.aiff"], start=1)
    ]
    with pytest.raises(ManifestError):
        prepare_manifest([AnnotationFile(Path("three.csv"), iter(rows[:3]))], cases, tmp_path / "none")
    summary = prepare_manifest([AnnotationFile(Path("four.csv"), iter(rows))], cases, tmp_path)
    assert (summary["kept"], summary["left_out"]) == (1, {"unusable_audio": 3})
    assert "twelve.aiff" in (tmp_path / "manifest.jsonl").read_text()


def test_memory_follows_what_is_there_not_what_a_header_declares(write_clip, monkeypatch):
    path, blocks = write_clip("cut.flac", RATE), []
    with open_audio(path) as file:
        whole = read_audio(path, RATE)
        monkeypatch.setattr(audio_files, "_BLOCK_SAMPLES", 1000)
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **_: blocks.append(n) or READ(self, n, **_))
        np.testing.assert_array_equal(decode(file, path)[:, 0], whole)
    assert max(blocks) == 1000


def test_more_than_is_read_at_once_is_refused_with_its_length(write_clip, monkeypatch):
    monkeypatch.setattr(audio_files, "_MOST_SAMPLES", RATE)
    assert len(read_audio(write_clip("one.wav", RATE), RATE)) == RATE
    with pytest.raises(AudioError, match=r"two\.wav: lasts 2 s in 1 channels, more than"):
        read_audio(write_clip("two.wav", 2 * RATE), RATE)
    assert len(read_audio(write_clip("two.wav", 2 * RATE), RATE, max_duration_seconds=0.5)) == RATE // 2


@pytest.mark.parametrize("rate", [99, 768_001, 16_821_316])
def test_no_filter_is_built_for_a_rate_that_no_recording_has(rate):
    with pytest.raises(ValueError, match=f"cannot resample {rate} Hz: rates lie between 100 and 768000 Hz"):
        resample(np.zeros(8, np.float32), rate, RATE)


def test_an_unwieldy_ratio_is_replaced_by_a_near_one():
    rate = 767_999  # a prime: up and down would be 24,000 and 767,999
    resampled = resample(np.sin(2 * pi * 440 * np.arange(rate // 4) / rate).astype(np.float32), rate, RATE)
    expected = np.sin(2 * pi * 440 * np.arange(len(resampled)) / RATE)
    assert len(resampled) == ceil(rate // 4 * RATE / rate)
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=1e-3)


def test_an_aiff_is_read(cases):
    assert read_audio(cases / "twelve.aiff", RATE).shape == (48000,)


def test_a_raw_file_has_no_rate(tmp_path):
    (tmp_path / "some.raw").write_bytes(bytes(100))
    with pytest.raises(AudioError, match=r"some\.raw: cannot be decoded"):
        read_audio(tmp_path / "some.raw", RATE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stereo_antiphase.wav", "its 2 channels cancel out, and their mean is 78 dB below the loudest"),
        ("stereo_left_silent.wav", "1 of its 2 channels are silent, and the mean of all is 6 dB below the loudest"),
    ],
)
def test_a_mean_that_loses_the_sound_is_warned_of_and_another_down_mix_keeps_it(cases, caplog, name, message):
    lossy_mixes.count = 0
    mean, loudest = (read_audio(cases / name, RATE, downmix=downmix) for downmix in ("mean", "loudest"))
    assert f"{name}: {message}; downmix=loudest keeps that one" in caplog.text
    assert lossy_mixes.report() == 1
    stored, _ = soundfile.read(cases / name, dtype="float32")
    np.testing.assert_array_equal(loudest, stored[:, 1] if "left" in name else stored[:, 0])
    np.testing.assert_allclose(mean, stored.mean(1), atol=1e-7)


def test_many_lossy_means_are_counted_and_the_first_few_named(caplog):
    mixes, antiphase = LossyMixes(), np.array([[0.5, -0.5]] * 9, np.float32)
    for number in range(12):
        mixes.note(f"clip {number}", antiphase)
    assert [record.message.split(":")[0] for record in caplog.records[:5]] == [f"clip {n}" for n in range(5)]
    assert len(caplog.records) == 6
    assert mixes.report() == 12
    assert "in 12 recordings" in caplog.text


def test_channels_that_add_up_lose_nothing():
    noise = np.random.default_rng(0).standard_normal((4800, 6)).astype(np.float32)
    assert loss_of_mean(noise) is None
    assert loss_of_mean(noise[:, :1].repeat(2, 1)) is None
    assert loss_of_mean(0 * noise) is None
    assert "5 of its 6 channels are silent" in loss_of_mean(noise * np.eye(6, dtype=np.float32)[2])
    assert "cancel out" in loss_of_mean(noise[:, :1] * np.array([1, -0.8], np.float32))


def test_the_first_channel_never_turns_sound_to_silence():
    left_silent = np.array([[0.0, 0.5], [0.0, -0.5]], np.float32)
    np.testing.assert_array_equal(first_heard(left_silent, 1)[:, 0], [0.5, -0.5])
    np.testing.assert_array_equal(first_heard(left_silent[:, ::-1], 1)[:, 0], [0.5, -0.5])
    np.testing.assert_array_equal(first_heard(0 * left_silent, 2), 0 * left_silent)


def test_an_unknown_down_mix_is_refused_with_those_that_exist(tmp_path):
    for call in (lambda: read_audio(tmp_path / "x.wav", RATE, downmix="left"), lambda: ClipSource([], downmix="left")):
        with pytest.raises(ValueError, match="downmix must be one of mean, loudest, refuse, got 'left'"):
            call()


def test_a_source_mixes_as_it_is_told(cases):
    entries = [ManifestEntry(cases / "stereo_antiphase.wav", "x", "x", None)]
    means, loudest = (ClipSource(entries, RATE, downmix=downmix).render(0, 0).audio for downmix in ("mean", "loudest"))
    assert means.abs().max() < 1e-4 < 0.1 < loudest.abs().max()
