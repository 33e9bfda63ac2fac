"""`data=synthetic`: every recipe takes steps with no data and no weights, and the figures are those of closed forms."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from foley.core.config import CONFIG_DIR
from foley.training import synthetic
from foley.training.callbacks.cost import COST_FILE, StepFlops, peak_flops
from foley.training.requirements import refuse_missing
from foley.training.run import objective
from foley.training.synthetic import random_teacher, stand_ins

SMALL_DIT = ["size.width=32", "size.depth=2", "size.num_heads=2"]
SMALL_CODEC = ["codec.width=16", "codec.latent_channels=4"]
QUICK = ["data=synthetic", "data.steps=2", "data.warmup_steps=1", "callbacks.progress=null", "trainer=cpu"]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", *overrides])


def measured(folder: Path, *overrides: str) -> dict:
    assert objective(config(*QUICK, f"paths.output_dir={folder}", *overrides)) is None
    assert not (folder / "checkpoints").exists()
    return json.loads((folder / COST_FILE).read_text())


def test_a_recipe_for_gpus_is_measured_without_data_or_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    more = ["model.gradient_checkpointing=true", "data.batch_size=2", "trainer.precision=32-true"]
    cost = measured(tmp_path, "experiment=ezaudio_xl", *SMALL_DIT, *more)
    assert (cost["clips_per_step"], cost["clip_seconds"], cost["measured_steps"]) == (2, 10.0, 2)
    assert cost["run_steps"] == 100_000
    assert cost["parameters_trained"] == cost["parameters"]  # the text encoder is no part of it
    # The blocks run once more, less than the whole forward pass.
    assert 0 < cost["recomputed_flops"] < cost["model_flops"] / 3
    share = cost["model_flops"] / cost["step_seconds"] / cost["peak_flops_per_second"]
    assert cost["model_flops_utilisation"] == pytest.approx(share)
    assert "what a step of test costs" in caplog.text


def test_a_short_run_is_measured_in_its_own_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    small = [*SMALL_DIT, "data.batch_size=2", "data.steps=9", "trainer.max_steps=2", "data.duration_seconds=0.5"]
    assert measured(tmp_path, "experiment=tiny", *small)["measured_steps"] == 2
    assert "measures 2 steps, after 1 that are not counted" in caplog.text
    for needless in ("whole run", "no clip is for validation", "max_steps=3", "litlogger", "FLOPs |"):
        assert needless not in caplog.text
    assert "denoiser (DiffusionTransformer)" in caplog.text


@pytest.mark.slow
def test_a_codec_is_measured_with_its_discriminator(tmp_path: Path) -> None:
    cost = measured(tmp_path, "experiment=tiny_vae", *SMALL_CODEC, "data.batch_size=2", "data.duration_seconds=0.3")
    alone = measured(
        tmp_path / "alone", "experiment=tiny_vae", *SMALL_CODEC, "data.batch_size=2", "data.duration_seconds=0.3",
        "task.discriminator=null",
    )  # fmt: skip
    assert cost["model_flops"] > alone["model_flops"]
    assert cost["clips_per_step"] == 2


@pytest.mark.slow
def test_a_student_is_measured_with_a_teacher_of_an_experiments_shapes(tmp_path: Path) -> None:
    cost = measured(
        tmp_path, "experiment=audiolcm", "data.teacher=tiny", "data.batch_size=1", "data.duration_seconds=0.5"
    )
    teacher = random_teacher("tiny").system.modules["denoiser"]
    assert cost["parameters"] > 3 * sum(parameter.numel() for parameter in teacher.parameters())  # student and target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "data"),
    [
        ("ezaudio_xl", {"channels": 128, "hop_samples": 480, "sample_rate_hz": 24000, "duration_seconds": 10.0}),
        ("audiolcm", {"channels": 20, "hop_samples": 512, "sample_rate_hz": 16000, "duration_seconds": 10.0}),
        ("tiny_lcm", {"channels": 32, "hop_samples": 480, "sample_rate_hz": 24000, "duration_seconds": 2.0}),
        ("bigvgan", {"sample_rate_hz": 16000, "duration_seconds": 0.512}),
        ("video_to_audio", {"channels": 20, "hop_samples": 512, "sample_rate_hz": 16000, "duration_seconds": 10.0}),
    ],
)
def test_shapes_are_the_recipes(experiment: str, data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "gpu_memory_gib", lambda: [80.0])
    cfg = config(f"experiment={experiment}", "data=synthetic", "paths.output_dir=x")
    refuse_missing(cfg)
    stood_in = stand_ins(cfg)
    assert {key: stood_in.data[key] for key in data} == data
    assert stood_in.data.batch_size == config(f"experiment={experiment}").data.batch_size
    refuse_missing(stood_in)
    assert ("RandomEmbeddings" in str(stood_in.text)) == (experiment in ("ezaudio_xl", "video_to_audio"))


def test_without_a_gpu_a_recipe_for_gpus_is_measured_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(synthetic, "gpu_memory_gib", lambda: None)
    cfg = stand_ins(config("experiment=ezaudio_xl", "data=synthetic", "paths.output_dir=x", "ckpt=ezaudio_xl"))
    assert cfg.ckpt is cfg.codec_path is None  # not read, nor fetched
    assert (cfg.trainer.accelerator, cfg.trainer.devices, cfg.data.batch_size) == ("cpu", 1, 1)
    assert "there is no GPU here: measured on the CPU" in caplog.text


def test_an_unknown_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="system=nowhere does not exist, nor does experiment=nowhere"):
        stand_ins(config("experiment=audiolcm", "data=synthetic", "system=nowhere", "paths.output_dir=x"))


def test_operations_of_a_step_in_closed_form() -> None:
    """Two linear layers, `[5, 8] -> [5, 4] -> [5, 3]`: the first has no gradient of its input to compute."""
    first, second, inputs = nn.Linear(8, 4), nn.Linear(4, 3), torch.randn(5, 8)
    products = {"first": 2 * 5 * 8 * 4, "second": 2 * 5 * 4 * 3}
    with StepFlops() as plain:
        second(first(inputs)).sum().backward()
    assert plain.model == 2 * products["first"] + 3 * products["second"]
    assert plain.recomputed == 0
    with StepFlops() as checkpointed:
        second(checkpoint(lambda x: first(x).tanh(), inputs, use_reentrant=False)).sum().backward()
    assert checkpointed.model == plain.model
    assert checkpointed.recomputed == products["first"]


def test_attention_counts_alike_on_every_path() -> None:
    """Q K and A V; back, the scores again and four more: 7 of 2 x B H L S D."""
    query, key, value = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    with StepFlops() as flops:
        nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    product = 2 * 2 * 3 * 7 * 7 * 4
    assert flops.model == 7 * product


def test_the_peak_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, source = peak_flops(torch.device("cpu"), "32-true")
    assert peak > 0
    assert source == "measured, products of 1024 x 1024 in float32"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    known = peak_flops(torch.device("cuda", 0), "bf16-mixed")
    assert known == (312e12, "data sheet of NVIDIA A100-SXM4-80GB, dense 16-bit")
