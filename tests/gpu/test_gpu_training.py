"""Trainings of every kind take steps on a GPU, are resumed there, and are loaded on a CPU."""

from pathlib import Path

import pytest
import torch
from gpu_parts import (
    DEVICE,
    FULL,
    ON_CUDA,
    SMALL_DENOISER,
    STEPS,
    Watch,
    read_cost,
    relative_difference,
    trained,
    trainer,
)

from foley.core.components import read_pickle
from foley.core.config import shipped
from foley.generation.text_to_audio import TextToAudio
from foley.training.shipped_latents import ShippedLatents

ALIGN = ["experiment=demo/denoiser", "stage=align", *([] if FULL else SMALL_DENOISER)]


@pytest.fixture(scope="module")
def on_latents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of what trains on latents: those of a few synthesised clips, in small batches."""
    folder = tmp_path_factory.mktemp("latents")
    seconds = 2.0 if FULL else 0.4
    ShippedLatents(str(folder), {"train": 16, "val": 4}, duration_seconds=seconds, batch_size=4)
    data = [f"data.cache_dir={next(folder.iterdir())}", f"codec_path={shipped('demo/codec')}", "data.batch_size=4"]
    data += ["data.repeats=null", f"data.duration_seconds={seconds}"]
    length = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "trainer.limit_val_batches=1"]
    schedule = ["lr_schedule.warmup_steps=1", f"callbacks.checkpoint.every_n_train_steps={STEPS}"]
    return [*data, *length, *schedule, "++callbacks.audio_samples=null", "trainer.log_every_n_steps=1"]


def stepped(watch: Watch, *components: str) -> bool:
    """Whether it ran on the device to its end, with finite losses, and moved the components."""
    return (
        watch.device == DEVICE.type
        and len(watch.losses) == STEPS
        and torch.tensor(watch.losses).isfinite().all().item()
        and set(components) <= watch.moved
    )


@pytest.mark.gpu(proof=1)
def test_alignment_takes_steps(tmp_path: Path, on_latents: list[str], record_property) -> None:
    """experiment=demo/denoiser with trainer=gpu takes 5 steps."""
    watch = trained(tmp_path / "run", *ALIGN, *on_latents, *trainer("gpu"))
    assert stepped(watch, "denoiser", "text")
    record_property("loss", f"{watch.losses[0]:.3f} to {watch.losses[-1]:.3f}")


@pytest.mark.gpu(proof=2)
def test_alignment_takes_steps_in_float16(tmp_path: Path, on_latents: list[str], record_property) -> None:
    """The same in 16-mixed, with loss scaling."""
    watch = trained(tmp_path / "run", *ALIGN, *on_latents, *trainer("gpu", "16-mixed"))
    assert stepped(watch, "denoiser", "text")
    record_property("loss", f"{watch.losses[0]:.3f} to {watch.losses[-1]:.3f}")


@pytest.mark.gpu(proof=3)
def test_data_parallel_training_takes_steps(tmp_path: Path, on_latents: list[str]) -> None:
    """trainer=ddp devices=auto on one GPU takes 5 steps."""
    watch = trained(tmp_path / "run", *ALIGN, *on_latents, *trainer("ddp"))
    assert stepped(watch, "denoiser", "text")


@pytest.mark.gpu(proof=4)
def test_a_run_is_resumed_here_and_loaded_on_a_cpu(tmp_path: Path, on_latents: list[str], record_property) -> None:
    """A run that stopped goes on to the weights of one that did not, and its checkpoint generates on a CPU."""
    shared = [*ALIGN, *on_latents, *trainer("gpu"), "lr_schedule.total_steps=20"]
    trained(tmp_path / "whole", *shared)
    trained(tmp_path / "halves", *shared, "trainer.max_steps=3", "callbacks.checkpoint.every_n_train_steps=3")
    watch = trained(tmp_path / "halves", *shared, "ckpt_path=auto")
    assert len(watch.losses) == STEPS - 3
    whole, halves = (read_pickle(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "halves"))
    assert whole["global_step"] == halves["global_step"] == STEPS
    weights = [torch.cat([t.flatten().float() for t in run["state_dict"].values()]) for run in (halves, whole)]
    difference = relative_difference(*weights)
    record_property("difference of resumed weights", f"{difference:.1e}")
    assert difference < (1e-4 if ON_CUDA else 1e-12)  # gradients of attention are summed in no fixed order on a GPU
    system = TextToAudio.load(tmp_path / "halves/checkpoints/last.ckpt", "cpu")
    assert system.generate(["a dog barks"], 0.5, num_steps=2).audio.isfinite().all()


@pytest.mark.gpu(proof=6)
def test_a_student_takes_steps(tmp_path: Path, on_latents: list[str]) -> None:
    """experiment=demo/student with trainer=gpu takes 5 steps."""
    watch = trained(
        tmp_path / "run", "experiment=demo/student", *on_latents, *trainer("gpu", None if FULL else "32-true")
    )
    assert stepped(watch)
    assert watch.moved


@pytest.mark.gpu(proof=7)
def test_a_codec_takes_steps_against_its_discriminator(tmp_path: Path, record_property) -> None:
    """experiment=waveform_vae takes steps with the discriminator on: both move, and what one costs is measured."""
    small = ["codec=tiny_waveform", "discriminator=stft_tiny", "data.duration_seconds=0.1", "data.batch_size=1"]
    size = ["data.batch_size=16", "data.steps=5"] if FULL else [*small, "data.steps=2"]
    steps = ["data=synthetic", "data.warmup_steps=1", *size, *trainer("gpu", None if FULL else "32-true")]
    watch = trained(tmp_path, "experiment=waveform_vae", *steps, synthetic=True)
    assert {"codec", "discriminator"} <= watch.moved
    cost = read_cost(tmp_path)
    record_property("step", f"{cost['step_seconds']:.3f} s")
    record_property("peak", f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB")


@pytest.mark.gpu(proof=12)
def test_sharded_training_takes_steps(tmp_path: Path, on_latents: list[str], record_property) -> None:
    """trainer=fsdp with one process takes 5 steps and saves; buffers and the denoiser's inputs stay in float32."""
    watch = trained(tmp_path / "run", *ALIGN, *on_latents, *trainer("fsdp"))
    assert stepped(watch)
    floating = {name: kind for name, kind in watch.buffer_types.items() if kind.is_floating_point}
    record_property("buffers", ", ".join(sorted({str(kind) for kind in floating.values()})))
    record_property("inputs", ", ".join(sorted(map(str, watch.input_types))))
    assert set(floating.values()) == {torch.float32}, floating
    assert torch.float32 in watch.input_types
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
