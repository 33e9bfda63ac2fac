"""A mel codec from the command line: train both parts, join them, encode with them; all of it on synthesised clips."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.core.components import load_component, read_config
from foley.core.config import PROJECT_ROOT
from foley.core.hashing import hash_module
from foley.data.encoding import encode_latents
from foley.data.latents import LatentCacheIndex
from foley.generation.text_to_audio import TextToAudio
from foley.models.codec.mel_codec import MelCodec
from foley.system.checkpoint import load_trained
from foley.system.system import load_system, save_system, untrained_system
from foley.training.run import train

QUICK = [
    *("data=procedural", "data.splits.sizes={train: 4, val: 2, test: 1}", "data.batch_size=2", "trainer=cpu"),
    *("trainer.max_time=null", "trainer.max_steps=3", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"),
    *("callbacks.checkpoint.every_n_train_steps=3", "callbacks.progress=null", "lr_schedule.warmup_steps=1"),
    "task.adversarial_start_step=1",
]
SMALL = {
    "tiny_mel_vae": ["codec.mel_vae.channels=16", "data.duration_seconds=0.5"],
    "tiny_vocoder": ["codec.vocoder.channels=16", "data.duration_seconds=0.128"],
}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose("train", ["name=test", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of both parts, by experiment."""
    folder = tmp_path_factory.mktemp("runs")
    for experiment, small in SMALL.items():
        output = f"paths.output_dir={folder / experiment}"
        metrics = train(config(f"experiment={experiment}", *QUICK, *small, output))
        assert {"train/adversarial", "train/discriminator", "val/loss"} <= metrics.keys()
    return {experiment: folder / experiment / "checkpoints/last.ckpt" for experiment in SMALL}


def join(monkeypatch: pytest.MonkeyPatch, folder: Path, **paths: Path) -> Path:
    script = PROJECT_ROOT / "scripts" / "join_mel_codec.py"
    overrides = [f"{name}={path}" for name, path in paths.items()]
    monkeypatch.setattr(sys, "argv", [str(script), *overrides, f"output_dir={folder}", f"hydra.run.dir={folder}_run"])
    runpy.run_path(str(script), run_name="__main__")
    return folder


@pytest.mark.slow
def test_trained_parts_join_and_encode(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"mel_vae": trained["tiny_mel_vae"], "vocoder": trained["tiny_vocoder"]}
    directory = join(monkeypatch, tmp_path / "codec", **paths)
    codec = load_component(directory)
    assert isinstance(codec, MelCodec)
    for name, path in paths.items():
        assert hash_module(getattr(codec, name)) == hash_module(load_trained(path, name))
    with torch.no_grad():
        assert codec.reconstruct(torch.randn(1, 1, 4001)).shape == (1, 1, 4001)

    data = instantiate(config("experiment=tiny_mel_vae", *QUICK).data, _convert_="all")
    encode_latents(codec, data.whole_clips(2.0), tmp_path / "latents")
    assert LatentCacheIndex.read(tmp_path / "latents").codec_hash == hash_module(codec)

    again = join(monkeypatch, tmp_path / "again", mel_vae=paths["mel_vae"], vocoder=paths["vocoder"])
    assert read_config(again) == read_config(directory)


def test_a_system_on_mel_latents_generates(tmp_path: Path) -> None:
    small = ["model.width=16", "model.depth=2", "model.num_heads=2", "codec.mel_vae.channels=16"]
    cfg = config("experiment=tiny", "codec=mel_16khz_tiny", *small, "codec.vocoder.channels=16")
    save_system(untrained_system(cfg), tmp_path)
    pipeline = TextToAudio(load_system(tmp_path))
    generated = pipeline.generate(["rain"], duration_seconds=0.7, num_steps=2)
    assert generated.audio.shape == (1, 1, 11200)
    assert pipeline.sample_rate_hz == 16000
    chunked = pipeline.generate(["rain"], duration_seconds=0.7, num_steps=2, decode_chunk_seconds=0.2)
    torch.testing.assert_close(chunked.audio, generated.audio, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("experiment", "steps", "samples"),
    [("audiolcm_mel_vae", 200_000, 312 * 512), ("bigvgan", 1_000_000, 8192)],
)
def test_published_numbers(experiment: str, steps: int, samples: int) -> None:
    cfg = config(f"experiment={experiment}", "data.splits=null")
    assert cfg.trainer.max_steps == steps
    assert cfg.data.sample_rate_hz == cfg.codec.sample_rate_hz == 16000
    assert round(cfg.data.duration_seconds * cfg.data.sample_rate_hz) == samples


def test_the_mel_vae_is_trained_as_published() -> None:
    task = config("experiment=audiolcm_mel_vae").task
    options = (task.adaptive_weight_limit, task.r1_weight, task.adversarial.linear_generator, task.weights.adversarial)
    assert options == (0.2, 3.0, True, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mel_16khz", "mel_16khz_tiny"])
def test_the_configs_build_codecs_whose_parts_hear_the_same(name: str) -> None:
    natural = "codec.vocoder.spectrogram.decimal_log=false"
    with torch.device("meta"):
        codec = instantiate(config("experiment=bigvgan", f"codec={name}").codec, _convert_="all")
        other = instantiate(config("experiment=bigvgan", f"codec={name}", natural).codec, _convert_="all")
    assert codec.mel_vae.spectrogram.decimal_log  # as published
    assert not other.mel_vae.spectrogram.decimal_log
    if name == "mel_16khz":  # the published autoencoder's, its two convolutions around the latent among them
        assert sum(parameter.numel() for parameter in codec.mel_vae.parameters()) == 212_958_212
    assert (codec.latent_channels, codec.hop_samples, codec.sample_rate_hz) == (20, 512, 16000)
