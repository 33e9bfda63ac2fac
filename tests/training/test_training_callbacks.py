"""Sounds at validation, throughput, and logs that a restart goes on with."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed
from training_parts import TinyData, build_module, run

from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import System
from foley.training.callbacks import listening
from foley.training.callbacks.evaluation import CachingCurves
from foley.training.callbacks.listening import AudioSamples
from foley.training.callbacks.monitoring import AppendingCSVLogger, Throughput, TrainingMemory
from foley.training.callbacks.non_finite import NonFiniteGuard
from foley.training.run import _rewind, _tell_loggers


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
    def gather(results: list, own: tuple[list[str], list[str]]) -> None:
        results[:] = [([], ["from rank 0"]), own]

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


def guarded(monkeypatch, others: tuple[list[str], list[str]] | None = None) -> NonFiniteGuard:
    """A guard, on one rank or on the second of two, of which the first has `others`."""

    def gather(results: list, own: tuple[list[str], list[str]]) -> None:
        results[:] = [others, own]

    monkeypatch.setattr(distributed, "is_initialized", lambda: others is not None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    return NonFiniteGuard()


def accumulate(guard: NonFiniteGuard, weights: list[float], losses: list[float]) -> None:
    """A step of several batches, "clip 0" and so on: their gradients are `weights`."""
    module = torch.nn.Module()
    module.parameter = torch.nn.Parameter(torch.zeros(1))
    trainer = SimpleNamespace(global_step=3, accumulate_grad_batches=len(weights))
    for index, (weight, loss) in enumerate(zip(weights, losses, strict=True)):
        guard.on_train_batch_start(trainer, module, {"id": [f"clip {index}"]}, index)
        guard.on_before_backward(trainer, module, torch.tensor(loss))
        (weight * module.parameter).sum().backward()
        guard.on_after_backward(trainer, module)
    guard.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters(), lr=0.1))


NAN = float("nan")


@pytest.mark.parametrize(
    ("weights", "losses", "named"),
    [
        ([1, NAN, 1], [1, NAN, 1], "['clip 1']"),
        ([1, NAN, 1], [1, 1, 1], "['clip 1']"),  # the gradient alone
        ([NAN, 1, NAN], [NAN, 1, NAN], "['clip 0', 'clip 2']"),
        ([1, 1, NAN], [1, 1, 1], "['clip 2']"),
    ],
)
def test_the_bad_one_of_accumulated_batches_is_named(monkeypatch, caplog, weights, losses, named) -> None:
    guard = guarded(monkeypatch)
    accumulate(guard, weights, losses)
    accumulate(guard, weights, losses)
    assert caplog.text.count(f"step 3 skipped: gradients are not finite; batch ids {named}\n") == 2


def test_the_bad_batch_of_another_rank_is_named(monkeypatch, caplog) -> None:
    """Gradients that ranks share are not finite on any of them; the losses are each rank's own."""
    accumulate(guarded(monkeypatch, (["clip of rank 0"], ["last of rank 0"])), [1, NAN], [1, 1])
    assert "batch ids ['clip of rank 0']\n" in caplog.text


def test_samples_are_of_the_validation_captions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec())
    data = TinyData()
    captions = ["", "waves", "a bell", "waves", "wind", "rain", "birds"]
    read = []
    data.datasets["val"].entries = (read.append(caption) or SimpleNamespace(caption=caption) for caption in captions)
    callback = samples(tmp_path / "samples")
    callback.num_captions = 3
    run(tmp_path, 7, data=data, callbacks=[callback])
    assert read == captions[:-1]  # one more than it takes, of however many
    stems = ["000_waves_seed0", "001_a-bell_seed1", "002_wind_seed2"]
    assert sorted(path.stem for path in (tmp_path / "samples/step_000007").glob("*.wav")) == stems


def test_captions_fall_back_to_the_prompts_given(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listening, "load_trained", lambda path, name: Codec())
    callback = samples(tmp_path / "samples")
    callback.num_captions = 3
    run(tmp_path, 7, callbacks=[callback])
    assert callback.prompts == ["A dog!", "../rain"]


class Recorded(WandbLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.media: dict = {}
        self.summary: dict = {}
        self.exit_code: int | None = None

    @property
    def experiment(self):
        return self

    def log_audio(self, key, audios, step=None, **options) -> None:
        self.media[key] = (audios, options["caption"])

    log_image = log_audio

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_sounds_go_to_wandb_as_files_of_the_run(tmp_path: Path) -> None:
    """A table of them would lie in the home folder, and be absent from a copy of the run."""
    logger = Recorded()
    samples(tmp_path)._log_media(logger, [tmp_path / "a.wav", tmp_path / "b.wav"], 7)
    assert logger.media == {
        "samples": ([f"{tmp_path}/a.wav", f"{tmp_path}/b.wav"], ["A dog!", "../rain"]),
        "spectrograms": ([f"{tmp_path}/a.png", f"{tmp_path}/b.png"], ["A dog!", "../rain"]),
    }


@pytest.mark.parametrize(
    ("error", "status", "exit_code"),
    [(None, "finished", 0), (RuntimeError("out of memory"), "crashed", 1), (KeyboardInterrupt(), "interrupted", 255)],
)
def test_every_logger_is_told_how_a_run_ended(tmp_path: Path, error, status: str, exit_code: int) -> None:
    wandb, tensorboard = Recorded(), TensorBoardLogger(str(tmp_path), name="", version="")
    _tell_loggers(SimpleNamespace(loggers=[wandb, tensorboard, AppendingCSVLogger(str(tmp_path))]), error)
    assert (wandb.summary["status"], wandb.exit_code) == (status, exit_code)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("status/text_summary")
    assert text.tensor_proto.string_val[0].decode().startswith(status)


def test_a_resumed_run_takes_back_what_it_logged_after_the_checkpoint(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    torch.save({"global_step": 4}, last)
    for steps, resume_from in ((range(7), None), (range(4, 6), last)):
        loggers = [TensorBoardLogger(str(tmp_path), name="", version=""), AppendingCSVLogger(str(tmp_path))]
        _rewind(SimpleNamespace(loggers=loggers), resume_from)
        for logger in loggers:
            for step in steps:
                logger.log_metrics({"train/loss": 1.0}, step)
            logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
    assert [row["step"] for row in csv.DictReader((tmp_path / "metrics.csv").open())] == [
        str(step) for step in range(6)
    ]


def test_the_activations_of_the_first_step_are_logged(tmp_path: Path) -> None:
    trainer, *_ = run(tmp_path, 2, callbacks=[TrainingMemory()])
    assert 0 < trainer.callback_metrics["memory/activation_mib"] < 1
