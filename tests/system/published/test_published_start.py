"""Published weights are where a run begins: fine-tuned, distilled, sampled from, in the published layout in small."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from latent_parts import latent_cache_writer
from omegaconf import DictConfig, OmegaConf
from published_controlnet import controlnet_weights

from foley.core import config as configs
from foley.core.config import CONFIG_DIR
from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.generation.text_to_audio import TextToAudio
from foley.system.checkpoint import load_trained, read_training_checkpoint
from foley.system.system import load_system, read_weights, save_system
from foley.training.control import ControlTraining
from foley.training.distillation import Teacher
from foley.training.run import train

STEPS = ["trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2", "lr_schedule.warmup_steps=1"]
STEPS += ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.progress=null", "data.batch_size=4"]


@pytest.fixture
def published(hub_dir: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Published names mean the small published layout, in the hub's folder; gives what brings a recipe to its size."""
    described, small = configs._compose_published, OmegaConf.from_dotlist(tiny)
    monkeypatch.setattr(configs, "_compose_published", lambda name: OmegaConf.merge(described(name), small))
    monkeypatch.setenv("FOLEY_HUB_DIR", str(hub_dir))
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "converted"))
    return tiny


@pytest.fixture
def latents(published: list[str], tmp_path: Path) -> Path:
    """Of the published codec, far from zero mean and unit variance."""
    codec = load_trained("ezaudio_l", "codec")
    with latent_cache_writer(
        tmp_path / "latents", hash_module(codec), codec.sample_rate_hz, codec.hop_samples
    ) as cache:
        for index in range(8):
            mean = 5 + 3 * torch.randn(codec.latent_channels, 20, generator=torch_generator("clip", index))
            split = "val" if index >= 4 else "train"
            cache.add(mean, torch.full_like(mean, 0.1), f"clip{index}", "a dog barks", "dog", split, 0.4)
    return tmp_path / "latents"


def config(latents: Path, folder: Path, *overrides: str) -> DictConfig:
    data = [f"data.cache_dir={latents}", "data.duration_seconds=0.4", f"paths.output_dir={folder}"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", *overrides, *STEPS, *data])


def test_every_form_of_published_weights_keeps_their_scale_and_their_codec(
    published: list[str], tmp_path: Path
) -> None:
    """By name, as a system's folder, as a part of it, and as a converted component, which alone knows no codec."""
    system = load_system("ezaudio_l")
    save_system(system, tmp_path / "system")
    (component,) = (tmp_path / "converted").glob("ezaudio-*")
    own, codec = dict(system.configs), hash_module(system.modules["codec"])
    for source in ("ezaudio_l", tmp_path / "system", tmp_path / "system/denoiser", component):
        saved = read_weights(source, own, codec)
        assert (saved["state_dict"]["normaliser.mean"] == 0).all()
        assert (saved["state_dict"]["normaliser.std"] == 1).all()
        assert saved["foley"]["codec_hash"] == codec
        expected = system.modules["denoiser"].state_dict()
        assert all(torch.equal(saved["state_dict"][f"denoiser.{key}"], value) for key, value in expected.items())
    assert read_weights("ezaudio_l", own, "another")["foley"]["codec_hash"] == codec
    assert read_weights(component, own, "another")["foley"]["codec_hash"] == "another"


def test_a_run_begins_without_the_published_text_encoder(
    published: list[str], hub_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub_dir / "google/flan-t5-large/model.safetensors").unlink()
    assert set(read_weights("ezaudio_l", {}, None)["foley"]["components"]) >= {"denoiser", "normaliser"}


def test_the_codec_of_published_weights_is_implied(tmp_path: Path) -> None:
    latents = tmp_path
    assert config(latents, tmp_path, "experiment=ezaudio_l", "ckpt=ezaudio_l").codec_path == "ezaudio_l"
    assert config(latents, tmp_path, "experiment=audiolcm", "system=ezaudio_l").codec_path == "ezaudio_l"
    assert config(latents, tmp_path, "experiment=ezaudio_l", "ckpt=RUN.ckpt").codec_path is None
    assert config(latents, tmp_path, "experiment=ezaudio_l").codec_path is None


@pytest.mark.slow
def test_published_weights_are_fine_tuned(latents: Path, published: list[str], tmp_path: Path) -> None:
    given = ["experiment=ezaudio_l", "stage=finetune", "ckpt=ezaudio_l", "callbacks.audio_samples.duration_seconds=0.2"]
    train(config(latents, tmp_path / "run", *given, *published))
    last = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = read_training_checkpoint(last)
    assert (checkpoint["global_step"], checkpoint["foley"]["codec_dir"]) == (2, "ezaudio_l")
    assert (checkpoint["state_dict"]["normaliser.mean"] == 0).all()
    assert (checkpoint["state_dict"]["normaliser.std"] == 1).all()
    moved = load_trained(last, "denoiser").state_dict()
    original = load_trained("ezaudio_l", "denoiser").state_dict()
    assert 0 < max(float((moved[key] - original[key]).abs().max()) for key in moved) < 1e-3
    assert TextToAudio.load(last).generate(["a dog barks"], 0.1, num_steps=2).audio.isfinite().all()
    # A next stage begins with these, and a run that was stopped goes on.
    train(config(latents, tmp_path / "next", *given[:2], f"ckpt={last}", "codec_path=ezaudio_l", *published))
    train(config(latents, tmp_path / "run", *given, *published, "ckpt_path=auto", "trainer.max_steps=3"))
    for run in ("next", "run"):
        state = read_training_checkpoint(tmp_path / run / "checkpoints/last.ckpt")["state_dict"]
        assert (state["normaliser.std"] == 1).all()


@pytest.mark.slow
def test_published_weights_are_distilled(latents: Path, published: list[str], tmp_path: Path) -> None:
    train(config(latents, tmp_path / "run", "experiment=audiolcm", "system=ezaudio_l"))
    last = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = read_training_checkpoint(last)
    assert (checkpoint["global_step"], checkpoint["foley"]["codec_dir"]) == (2, "ezaudio_l")
    assert checkpoint["foley"]["teacher_hash"] == hash_module(Teacher.load("ezaudio_l").system.modules["denoiser"])
    student = TextToAudio.load(last)
    assert student.generate(["a dog barks"], 0.1).settings["num_steps"] == 2


@pytest.fixture
def energy(published: list[str], hub_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The published ControlNet, in the hub's folder beside its denoiser."""
    denoiser = torch.load(hub_dir / "OpenSound/EzAudio/ckpts/s3/ezaudio_s3_l.pt", weights_only=True)["model"]
    weights = controlnet_weights(denoiser, width=48, depth=4)
    file = hub_dir / "OpenSound/EzAudio/ckpts/controlnet/s3_l_energy.pt"
    file.parent.mkdir()
    torch.save({"model": weights}, file)
    return weights


def test_the_published_controlnet_follows_a_recording(energy: dict[str, torch.Tensor], tmp_path: Path) -> None:
    generator = TextToAudio.load("ezaudio_l_energy")
    assert torch.equal(generator.denoiser.control.projections[1].bias, energy["controlnet_zero_blocks.1.bias"])
    generator.system = replace(generator.system, trained_seconds=0.2)
    rate, hop = generator.sample_rate_hz, generator.codec.hop_samples
    soundfile.write(tmp_path / "dog.wav", 0.1 * torch.randn(3 * hop).numpy(), rate)
    options = {"num_steps": 2, "seeds": [3]}
    followed = generator.follow(["a dog barks"], tmp_path / "dog.wav", **options).audio
    assert followed.shape == (1, 1, 3 * hop)  # as long as the recording, though made in the length of the training
    plain = generator.follow(["a dog barks"], tmp_path / "dog.wav", scale=0.0, **options).audio
    as_ever = TextToAudio.load("ezaudio_l").generate(["a dog barks"], 0.2, **options).audio
    assert torch.equal(plain, as_ever[..., : 3 * hop])
    assert not torch.allclose(followed, plain, atol=1e-4)
    # It is a system to go on training, too.
    base = Teacher(generator.system, set())
    module = ControlTraining(base, generator.codec, partial(torch.optim.AdamW, lr=1e-4))
    assert module.denoiser is generator.denoiser
    with pytest.raises(ValueError, match="this system has no ControlNet; give system=ezaudio_l_energy"):
        TextToAudio.load("ezaudio_l").follow(["a dog barks"], tmp_path / "dog.wav")
