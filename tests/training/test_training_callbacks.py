"""Sounds at validation, throughput, and logs that a restart goes on with."""

import csv
from pathlib import Path

import soundfile
import torch
from training_parts import build_module, run

from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import Solver
from foley.training.callbacks import audio_samples
from foley.training.callbacks.audio_samples import AudioSamples
from foley.training.callbacks.throughput import Throughput
from foley.training.csv_logger import AppendingCSVLogger


class Codec(torch.nn.Module):
    """Ten samples a frame."""

    sample_rate_hz = 1000

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.mean(dim=1, keepdim=True).repeat_interleave(10, dim=-1)


def samples(folder: Path, every: int = 1) -> AudioSamples:
    prompts = ["A dog!", "../rain"]
    return AudioSamples("codec", str(folder), prompts, 100, ClassifierFreeGuidance(2.0), Solver("ddim", 3), every)


def test_audio_samples_are_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(audio_samples, "load_trained", lambda path, name: Codec())
    run(tmp_path, 14, callbacks=[samples(tmp_path / "samples", every=2)])
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_000007"}
    names = sorted(path.name for path in (tmp_path / "samples/step_000007").iterdir())
    assert names == ["00_a_dog_.png", "00_a_dog_.wav", "01__rain.png", "01__rain.wav"]
    assert soundfile.info(tmp_path / "samples/step_000007/00_a_dog_.wav").frames == 1000


def test_samples_repeat_and_ignore_their_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(audio_samples, "load_trained", lambda path, name: Codec())
    module = build_module()
    both, alone = samples(tmp_path), samples(tmp_path)
    alone.prompts = alone.prompts[:1]
    torch.testing.assert_close(both.generate(module)[:1], alone.generate(module))


def test_a_stage_without_text_has_no_samples(tmp_path: Path) -> None:
    run(tmp_path, 7, module=build_module(context_dim=None), callbacks=[samples(tmp_path / "samples")])
    assert not (tmp_path / "samples").exists()


def test_throughput_counts_audio(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path, 3, callbacks=[Throughput(clip_seconds=2.5, every_n_steps=2)])
    clips = trainer.callback_metrics["throughput/clips_per_second"]
    assert clips > 0
    torch.testing.assert_close(trainer.callback_metrics["throughput/audio_seconds_per_second"], 2.5 * clips)


def test_csv_log_goes_on(tmp_path: Path) -> None:
    for step, metrics in enumerate([{"a": 1.0}, {"a": 2.0, "b": 3.0}]):
        logger = AppendingCSVLogger(str(tmp_path))
        logger.log_metrics(metrics, step)
        logger.save()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("0", "1.0", ""), ("1", "2.0", "3.0")]
