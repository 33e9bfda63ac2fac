"""Every recipe takes two optimizer steps as it resolves on a machine with GPUs, and saves what it has learnt.

It runs on the CPU, in small and on random data, with the precision, the fused optimizer and the strategy of the GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from small_system import CONFIGS
from torch import distributed

from foley.core.config import CONFIG_DIR
from foley.system.system import build_system, save_system
from foley.training import synthetic
from foley.training.run import train
from foley.training.synthetic import stand_ins

RECIPES = sorted(
    str(file.relative_to(CONFIG_DIR / "experiment").with_suffix(""))
    for file in (CONFIG_DIR / "experiment").rglob("*.yaml")
)
SMALL_CODECS = {
    "waveform_24khz": "tiny_waveform",
    "waveform_44khz_stereo": "tiny_stereo",
    "mel_16khz": "mel_16khz_tiny",
    "dac_44khz": "dac_tiny",
}
# The discriminator of the first is as wide as published; the others are as recipes that stay.
SLOW = dict.fromkeys(
    ("dac", "waveform_vae_ours", "waveform_vae_stereo", "tiny_vocoder", "demo/vae", "demo/codec", "demo/decoder"),
    pytest.mark.slow,
)
SMALL = {"width": 32, "depth": 2, "num_heads": 2, "rank": 2}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on what a run of two steps lacks


@contextmanager
def gpus() -> Iterator[None]:
    """A machine with two large GPUs, for all who ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(synthetic, "gpu_memory_gib", lambda: [80.0, 80.0])
        yield


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A data-parallel run leaves variables and a process group behind."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    if distributed.is_initialized():
        distributed.destroy_process_group()


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", *overrides], return_hydra_config=True)


def in_small(recipe: str, *overrides: str) -> DictConfig:
    """A recipe as it is on a machine with GPUs, on random data; its networks are those of tests."""
    choices = composed(f"experiment={recipe}").hydra.runtime.choices
    small = [f"experiment={recipe}", "data=synthetic"]
    if (codec := choices.codec) in SMALL_CODECS:
        small.append(f"codec={SMALL_CODECS[codec]}")
    if (discriminator := choices.get("discriminator")) and not discriminator.endswith("_tiny"):
        small.append(f"discriminator={discriminator}_tiny")
    if "cpu" in choices.trainer:
        small.append("trainer=ddp" if "ddp" in choices.trainer else "trainer=gpu")
    cfg = composed(*small, *overrides)
    with open_dict(cfg):
        for name, value in SMALL.items():
            for part in (cfg.get("size"), cfg.get("model")):
                if part is not None and name in part:
                    part[name] = value
        del cfg.hydra
    return cfg


def on_the_cpu(cfg: DictConfig, folder: Path) -> DictConfig:
    """What `cfg` comes to on a machine with GPUs, to be run here: one process, two steps, a checkpoint."""
    with gpus(), open_dict(cfg):
        cfg.paths.output_dir, cfg.ckpt_path = str(folder), None
        cfg.data.batch_size, cfg.data.duration_seconds = 2, min(cfg.data.duration_seconds, 0.256)
        checkpoint, cost = cfg.callbacks.checkpoint, None
        if {"teacher", "base"} & set(cfg.task):
            cfg.system = cfg.ckpt = str(folder / "teacher")
            torch.manual_seed(0)  # the same teacher for every run
            save_system(build_system(CONFIGS), folder / "teacher")
        cfg = stand_ins(cfg)
        cfg.callbacks.update({"checkpoint": checkpoint, "cost": cost})
        OmegaConf.resolve(cfg)
        assert cfg.trainer.accelerator == "gpu"
        cfg.trainer.update({"accelerator": "cpu", "devices": 1, "max_steps": 2, "accumulate_grad_batches": 1})
    return cfg


def state_after_two_steps(cfg: DictConfig, folder: Path) -> dict[str, torch.Tensor]:
    train(cfg)
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    return checkpoint["state_dict"]


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=SLOW.get(name, ())) for name in RECIPES])
def test_a_recipe_takes_two_steps_as_on_a_gpu(recipe: str, tmp_path: Path) -> None:
    cfg = on_the_cpu(in_small(recipe), tmp_path)
    assert cfg.trainer.precision == "bf16-mixed"
    assert cfg.optimizer.fused
    state_after_two_steps(cfg, tmp_path)
