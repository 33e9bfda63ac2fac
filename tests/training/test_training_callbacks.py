"""Sounds at validation, throughput, and logs that a restart goes on with."""

import csv
from pathlib import Path
from types import SimpleNamespace

import soundfile
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import distributed
from training_parts import build_module, run

from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import System
from foley.training.callbacks import listening
from foley.training.callbacks.evaluation import CachingCurves
from foley.training.callbacks.listening import AudioSamples
from foley.training.callbacks.monitoring import AppendingCSVLogger, Throughput, TrainingMemory
from foley.training.callbacks.non_finite import NonFiniteGuard


class Codec(torch.nn.Module):
    """Ten samples a frame."""

    sample_rate_hz = 1000
    hop_samples = 10

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.mean(dim=1, keepdim=True).repeat_interleave(10, dim=-1)


def samples(folder: Path, every: int = 1) -> AudioSamples:
    prompts = ["A dog!", "../rain"]
    return AudioSamples("codec", str(folder), prompts, 0.995, ClassifierFreeGuidance(2.0), 3, every)


def test_audio_samples_are_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec())
    run(tmp_path, 14, callbacks=[samples(tmp_path / "samples", every=2)])
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_000007"}
    names = sorted(path.name for path in (tmp_path / "samples/step_000007").iterdir())
    stems = ["000_a-dog_seed0", "001_rain_seed1"]
    assert names == [f"{stem}.{suffix}" for stem in stems for suffix in ("png", "wav")]
    assert soundfile.info(tmp_path / "samples/step_000007/000_a-dog_seed0.wav").frames == 995


def test_change_curves_come_with_the_samples(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec())
    callback = CachingCurves("codec", str(tmp_path / "samples"), ["rain"], 0.995, ClassifierFreeGuidance(2.0), 3)
    module = build_module()
    module.denoiser.inner.cacheable_kind = "feed_forward"
    trainer, _, _ = run(tmp_path, 7, module=module, callbacks=[callback])
    changes = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("caching/")}
    assert set(changes) == {"caching/change_feed_forward"}
    assert all(value > 0 for value in changes.values())
    names = {path.name for path in (tmp_path / "samples/step_000007").iterdir()}
    assert names == {"000_rain_seed0.wav", "000_rain_seed0.png", "caching_curves.png"}


def test_the_norm_of_the_gradients_is_logged(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path, 1)
    assert trainer.callback_metrics["train/grad_norm"] > 0


def test_a_sample_is_what_the_pipeline_makes_of_its_prompt_and_seed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec())
    module = build_module()
    parts = {"denoiser": module.denoiser, "text": module.text, "codec": Codec(), "normaliser": module.normaliser}
    pipeline, guidance = TextToAudio(System(parts, module.process, {})), ClassifierFreeGuidance(2.0)
    alone = pipeline.generate(["../rain"], 0.995, seeds=[1], guidance=guidance, num_steps=3)
    torch.testing.assert_close(samples(tmp_path).generate(module, Path("codec"))[1:], alone.audio)


def test_a_restart_goes_on_counting_validations(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec())
    run(tmp_path, 8, callbacks=[samples(tmp_path / "samples", every=2)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    run(tmp_path, 14, last, callbacks=[samples(tmp_path / "samples", every=2)])
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_000007"}


def test_samples_without_a_codec_are_left_out(tmp_path: Path, caplog) -> None:
    silent = AudioSamples(None, str(tmp_path / "samples"), ["rain"], 1.0, ClassifierFreeGuidance())
    run(tmp_path, 7, callbacks=[silent])
    assert "set codec_path=" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_a_stage_without_text_has_no_samples(tmp_path: Path) -> None:
    run(tmp_path, 7, module=build_module(context_dim=None), callbacks=[samples(tmp_path / "samples")])
    assert not (tmp_path / "samples").exists()


def test_a_model_of_features_has_no_samples_of_captions(tmp_path: Path, caplog) -> None:
    module = build_module()
    module.text.prompt_field = "id"
    run(tmp_path, 7, module=module, callbacks=[samples(tmp_path / "samples")])
    assert "takes no captions" in caplog.text
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


def test_other_ranks_write_no_csv(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    AppendingCSVLogger(str(tmp_path / "log")).experiment.log_metrics({"a": 1.0}, 0)
    assert not (tmp_path / "log").exists()


def test_skipped_steps_name_the_clips_of_all_ranks(monkeypatch, caplog) -> None:
    def gather(results: list, ids: list[str]) -> None:
        results[:] = [["from rank 0"], ids]

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([float("nan")])
    guard = NonFiniteGuard(max_consecutive=2)
    guard.on_train_batch_start(None, None, {"id": ["from rank 1"]}, 0)
    guard.on_before_optimizer_step(SimpleNamespace(global_step=3), None, torch.optim.SGD([parameter], lr=0.1))
    assert parameter.grad is None
    assert "step 3 skipped: gradients are not finite; batch ids ['from rank 0', 'from rank 1']" in caplog.text


def test_the_activations_of_the_first_step_are_logged(tmp_path: Path) -> None:
    trainer, *_ = run(tmp_path, 2, callbacks=[TrainingMemory()])
    assert 0 < trainer.callback_metrics["memory/activation_mib"] < 1
