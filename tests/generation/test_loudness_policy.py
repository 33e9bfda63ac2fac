"""Files at a loudness: what is written, what its JSON says, and what is refused; clips in memory stay as they are."""

import json

import numpy as np
import pytest
import soundfile
import torch

from foley.data.audio import PEAK_CEILING, encode_audio, read_channels
from foley.generation.editing import Edit, EditMask, Variation
from foley.generation.prompts import Clip
from foley.generation.result import Generation, Timings
from foley.generation.settings import GenerationSettings
from foley.metrics.loudness import integrated_loudness, true_peak

RATE = 24000


def made(audio, loudness_lufs=-23.0):
    """`audio` `[T]` as a generation of one clip."""
    settings = {} if loudness_lufs is None else {"loudness_lufs": loudness_lufs}
    return Generation([Clip("rain", 0)], audio[None, None], RATE, settings, Timings(denoise_seconds=1.0))


def noise(level=0.02, seconds=1.0):
    return level * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))


def written(generation, folder):
    """Samples `[T, 1]` of the file, and what its JSON says."""
    stem = generation.write_clip(folder, 0, 0)
    samples, _ = read_channels(folder / f"{stem}.wav")
    return samples, json.loads((folder / f"{stem}.json").read_text())


@pytest.mark.parametrize("level", [0.002, 0.02, 0.2, 2.0])
def test_a_file_has_the_loudness_that_was_asked_for(tmp_path, level):
    generation = made(noise(level))
    samples, told = written(generation, tmp_path)
    assert integrated_loudness(samples, RATE) == pytest.approx(-23.0, abs=0.05)
    before = integrated_loudness(generation.audio[0].T.numpy(), RATE)
    assert told["gain_db"] == pytest.approx(-23.0 - before, abs=0.01)
    assert told["loudness"] == {
        "target_lufs": -23.0,
        "measured_lufs": pytest.approx(before, abs=0.01),
        "limited_by_true_peak": False,
    }
    assert torch.equal(generation.audio[0, 0], noise(level))


def test_the_true_peak_keeps_to_its_ceiling_and_it_is_said(tmp_path, caplog):
    audio = torch.zeros(RATE)
    audio[::2400] = 0.1
    generation = made(audio, -10.0)
    samples, told = written(generation, tmp_path)
    assert true_peak(samples, RATE) == pytest.approx(PEAK_CEILING, abs=1e-3)
    assert told["loudness"]["limited_by_true_peak"] is True
    generation.warn_of_levels()
    assert (
        "loudness_lufs=-10: 1 of 1 clips stay below it, with their true peak at the ceiling of -1.0 dBTP" in caplog.text
    )


@pytest.mark.parametrize(
    ("audio", "reason"), [(noise(seconds=0.3), "shorter than 0.4 s"), (torch.zeros(RATE), "silent")]
)
def test_short_and_silent_clips_are_left_and_said(tmp_path, caplog, audio, reason):
    generation = made(audio)
    samples, told = written(generation, tmp_path)
    assert np.allclose(samples[:, 0], audio.numpy(), atol=1 / 32768)
    assert told["gain_db"] == 0
    assert told["loudness"]["left"].startswith(reason)
    generation.warn_of_levels()
    assert f"loudness_lufs=-23: 1 of 1 clips are left as they are: {reason}" in caplog.text


def test_without_a_loudness_nothing_is_as_it_was_not_before(tmp_path):
    generation = made(noise(), None)
    samples, told = written(generation, tmp_path)
    assert "loudness" not in told
    assert generation.encode(0) == encode_audio(noise(), RATE)
    assert np.allclose(samples[:, 0], noise().numpy(), atol=1 / 32768)


def test_stereo_and_another_format_have_it_too(tmp_path):
    audio = torch.stack([noise(), 0.5 * noise().flip(0)])
    generation = Generation([Clip("rain", 0)], audio[None], RATE, {"loudness_lufs": -30.0}, Timings())
    for name in ("wav", "flac"):  # which change no sample
        (tmp_path / "clip").write_bytes(generation.encode(0, name))
        samples, rate = soundfile.read(tmp_path / "clip", dtype="float32", always_2d=True)
        assert integrated_loudness(samples, rate) == pytest.approx(-30.0, abs=0.1)


def test_settings_tell_it_and_refuse_it_beside_an_edit():
    settings = GenerationSettings(loudness_lufs=-23.0)
    assert settings.describe(settings.choose_guidance(), "ddim", 2)["loudness_lufs"] == -23.0
    assert "loudness_lufs" not in GenerationSettings().describe(settings.choose_guidance(), "ddim", 2)
    GenerationSettings(loudness_lufs=-23.0, source=Variation("a.wav"))
    with pytest.raises(ValueError, match="loudness_lufs=-23 and edit exclude each other"):
        GenerationSettings(loudness_lufs=-23.0, source=Edit("a.wav", EditMask(0.0, 1.0)))


@pytest.mark.parametrize("value", [-80, 0, 3, "loud"])
def test_impossible_loudness_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^loudness_lufs=.*: give a number >= -70 and <= -5"):
        GenerationSettings(loudness_lufs=value)
