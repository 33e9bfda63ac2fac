"""A calibration of many prompts: shared out, continued batch by batch, merged into what one run would give."""

from types import SimpleNamespace

import pytest
import torch
from small_system import CONFIGS

from foley.accel.caching.calibration import Calibration, CalibrationRecorder
from foley.core.files import info_path
from foley.generation.calibrating import CalibrationRun
from foley.generation.prompts import as_clips
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system

SETTINGS = GenerationSettings(duration_seconds=0.2, num_steps=3, solver="ddim", batch_size=2)
CLIPS = as_clips([f"sound {number}" for number in range(7)])


@pytest.fixture(scope="module")
def generator():
    return TextToAudio(build_system(CONFIGS))


def process(rank: int = 0, world_size: int = 1):
    return SimpleNamespace(
        global_rank=rank, world_size=world_size, is_global_zero=rank == 0, barrier=lambda: None, device="cpu"
    )


def run_in(folder, clips=CLIPS) -> CalibrationRun:
    return CalibrationRun(folder, clips, {"prompts": [clip.prompt for clip in clips]})


def test_batches_merge_into_the_calibration_of_all(generator, tmp_path):
    at_once = CalibrationRecorder(2)
    generator.generate_clips(CLIPS, GenerationSettings(**{**vars(SETTINGS), "batch_size": 7, "accelerator": at_once}))
    found, expected = run_in(tmp_path).record(generator.denoise_clips, SETTINGS, process(), 2), at_once.calibration()
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.std, expected.std, atol=1e-6, rtol=1e-4)
    assert (found.num_prompts, found.signature) == (7, expected.signature)
    assert found.mean.dtype == torch.float32
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_that_stopped_makes_only_the_batches_that_are_missing(generator, tmp_path):
    whole = run_in(tmp_path / "whole").record(generator.denoise_clips, SETTINGS, process(), 2)
    made = []

    def denoise(clips, settings):
        made.append([clip.seed for clip in clips])
        if len(made) == 3:
            raise KeyboardInterrupt
        generator.denoise_clips(clips, settings)

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path).record(denoise, SETTINGS, process(), 2)
    found = run_in(tmp_path).record(denoise, SETTINGS, process(), 2)
    assert made == [[0, 1], [2, 3], [4, 5], [4, 5], [6]]
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.std, whole.std)


def test_batches_stay_until_their_calibration_is_kept(generator, tmp_path):
    def full(calibration):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        run_in(tmp_path).record(generator.denoise_clips, SETTINGS, process(), 2, full)
    kept = []
    found = run_in(tmp_path).record(None, SETTINGS, process(), 2, kept.append)  # nothing is denoised again
    assert kept == [found]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_processes_make_what_one_makes(generator, tmp_path, monkeypatch):
    alone = run_in(tmp_path / "alone").record(generator.denoise_clips, SETTINGS, process(), 2)
    kept = {}

    def stop_at_the_merge(parts):
        kept["parts"] = len(list(parts))

    # The second process has made its share, and waits for the first, which merges.
    load = Calibration.load
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "load", lambda stem: info_path(stem).is_file() and load(stem))
        patch.setattr(Calibration, "merged", stop_at_the_merge)
        run_in(tmp_path).record(generator.denoise_clips, SETTINGS, process(1, 2), 2)
    assert kept["parts"] == 4
    assert len(list(tmp_path.glob("parts_*/*.json"))) == 2
    shared = run_in(tmp_path).record(generator.denoise_clips, SETTINGS, process(0, 2), 2)
    assert torch.equal(shared.mean, alone.mean)
    assert torch.equal(shared.std, alone.std)


def test_nothing_is_decoded_and_nothing_kept_of_a_clip(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "_decode", None)
    recorder = CalibrationRecorder(1)
    sizes = set()
    for _ in range(3):
        generator.denoise_clips(CLIPS[:2], GenerationSettings(**{**vars(SETTINGS), "accelerator": recorder}))
        sizes.add(sum(value.numel() for value in vars(recorder).values() if isinstance(value, torch.Tensor)))
    assert len(sizes) == 1
    assert recorder.calibration().num_prompts == 6
