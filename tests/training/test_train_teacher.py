"""AudioLCM's teacher from the outside: it trains with noise prediction and as a flow, samples, and is distilled."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from test_train_cli import QUICK, cache, config, small  # noqa: F401  (the fixture of cached latents)

from foley.core.components import build_component
from foley.data.latents import LatentCacheIndex
from foley.generation.text_to_audio import TextToAudio
from foley.models.dit.llama import LlamaTransformer
from foley.system.checkpoint import read_training_checkpoint
from foley.system.system import System, load_system
from foley.training.run import train

CODEC = "codec=tiny"


def sampler(checkpoint: Path) -> TextToAudio:
    """The trained system, with an untrained codec."""
    system = load_system(checkpoint, with_codec=False)
    codec = OmegaConf.to_container(config(CODEC).codec, resolve=True)
    modules = {**system.modules, "codec": build_component(codec)}
    return TextToAudio(System(modules, system.process, system.configs, system.consistency))


def train_teacher(latents: Path, folder: Path, *overrides: str) -> Path:
    fast = ["trainer.precision=32-true", "callbacks.audio_samples=null", "trainer.max_steps=2"]
    metrics = train(small(latents, folder, "tiny_audiolcm_teacher", CODEC, *fast, *overrides))
    assert metrics["train/loss"] > 0
    assert metrics["val/loss"] > 0
    return folder / "checkpoints/last.ckpt"


def test_the_published_configuration() -> None:
    cfg = config("experiment=audiolcm_teacher", "data=music")
    assert cfg.model.latent_channels == 20
    assert cfg.model._target_ == "foley.models.dit.llama.LlamaTransformer"
    assert (cfg.model.width, cfg.model.depth, cfg.model.num_heads, cfg.model.context_dim) == (576, 4, 8, 1024)
    assert (cfg.process.prediction, cfg.process.zero_terminal_snr) == ("epsilon", False)
    assert cfg.data.cache_dir.endswith("latents/music")
    assert cfg.task.masking is None
    flow = config("experiment=audiolcm_teacher", "data=music", "process=flow")
    assert (flow.process.prediction, flow.data.cache_dir) == ("flow", cfg.data.cache_dir)


@pytest.mark.parametrize(
    "process",
    ["epsilon", *(pytest.param(process, marks=pytest.mark.slow) for process in ("flow", "flow_logit_normal"))],
)
def test_a_teacher_trains_samples_and_is_distilled(cache: Path, tmp_path: Path, process: str) -> None:  # noqa: F811
    teacher = train_teacher(cache, tmp_path / "teacher", f"process={process}")
    system = sampler(teacher)
    assert isinstance(system.denoiser, LlamaTransformer)
    is_flow = process != "epsilon"
    settings = {"num_steps": 2, "duration_seconds": 0.2}
    result = system.generate(["rain"], **settings)
    assert result.settings["solver"] == ("euler_flow" if is_flow else "ddim")
    assert system.generate(["rain"], **settings, solver="heun_flow" if is_flow else "heun").audio.isfinite().all()

    overrides = [f"system={teacher}", f"data.cache_dir={cache}", f"paths.output_dir={tmp_path / 'student'}", *QUICK]
    distil = ["experiment=tiny_lcm", "+lora@task.lora=default", "task.lora.rank=2", "trainer.precision=32-true"]
    train(config(*distil, "data.batch_size=4", *overrides, "trainer.max_steps=2"))
    last = tmp_path / "student/checkpoints/last.ckpt"
    assert any(".lora_A." in key for key in read_training_checkpoint(last)["state_dict"])
    student = sampler(last)
    assert type(student.denoiser) is LlamaTransformer
    assert not any("lora" in key for key in student.denoiser.state_dict())
    assert student.generate(["rain"], 0.2).settings["solver"] == "consistency"


def test_adapters_are_an_option_of_the_published_distillation() -> None:
    cfg = config("experiment=audiolcm_lora", "system=x", "data.cache_dir=y")
    assert (cfg.task.lora.rank, cfg.trainer.max_steps) == (16, 15_000)
    assert config("experiment=audiolcm", "system=x", "data.cache_dir=y").task.lora is None


@pytest.fixture
def features(cache: Path, tmp_path: Path) -> Path:  # noqa: F811
    folder = tmp_path / "features"
    folder.mkdir()
    for entry in LatentCacheIndex.read(cache).entries:
        save_file({"features": torch.randn(4, 512)}, folder / f"{entry.id}.safetensors")
    return folder


def test_video_to_audio_is_a_configuration(cache: Path, tmp_path: Path, features: Path) -> None:  # noqa: F811
    video = ["text=cavp", "text.dim=16", f"text.directory={features}", "process=flow"]
    last = train_teacher(cache, tmp_path / "run", *video)
    system = sampler(last)
    files = sorted(map(str, features.glob("*.safetensors")))[:2]
    result = system.generate(files, 0.2, num_steps=2)
    assert result.audio.shape[0] == 2
    trained = read_training_checkpoint(last)["state_dict"]
    assert {"text.empty_embedding", "text.projection.weight"} <= trained.keys()
    with pytest.raises(ValueError, match="precomputed features go with whole clips"):
        train_teacher(cache, tmp_path / "cropped", *video, "data.duration_seconds=1.0")


def test_the_published_video_configuration(tmp_path: Path) -> None:
    cfg = config("experiment=video_to_audio", "data.cache_dir=x", f"text.directory={tmp_path}")
    assert (cfg.process.prediction, cfg.model.context_dim, cfg.model.depth) == ("flow", 768, 16)
