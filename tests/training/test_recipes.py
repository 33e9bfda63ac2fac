"""The configs of training as recipes: few files, few levels, and stages that are rows of one table."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from commands import compose_command
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigResult
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError
from torch import nn

from foley.core.config import PROJECT_ROOT

CONFIGS = PROJECT_ROOT / "configs"
MOST_FILES, MOST_LEVELS = 12, 3


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["name=test", *overrides])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The config files that are read from here on, but for Hydra's own group, which says nothing of a recipe."""
    paths: set[str] = set()
    load = ConfigRepository.load_config

    def watched(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
        result = load(repository, config_path)
        if result is not None and result.path.startswith("file://") and not config_path.startswith("hydra/"):
            paths.add(config_path.removesuffix(".yaml"))
        return result

    monkeypatch.setattr(ConfigRepository, "load_config", watched)
    return paths


@pytest.mark.parametrize("stage", [None, "pretrain", "align", "finetune"])
def test_the_published_recipe_is_composed_of_few_files(read: set[str], stage: str | None) -> None:
    config("experiment=ezaudio_xl", *([f"stage={stage}"] if stage else []))
    assert {"train", "experiment/ezaudio_xl", "model/ezaudio", "size/xl"} <= read
    assert len(read) <= MOST_FILES, sorted(read)


def levels(file: Path) -> int:
    """A config of a group and those of the same group that it builds on, counted along the longest chain."""
    group = file.relative_to(CONFIGS).parts[0]
    entries = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    bases = [entry.partition("@")[0] for entry in entries if isinstance(entry, str) and entry != "_self_"]
    paths = [CONFIGS / base.lstrip("/") if base.startswith("/") else file.parent / base for base in bases]
    return 1 + max(
        (levels(path.with_suffix(".yaml")) for path in paths if path.parts[len(CONFIGS.parts)] == group), default=0
    )


@pytest.mark.parametrize("group", sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
def test_no_config_is_buried_under_others(group: str) -> None:
    assert max(levels(file) for file in (CONFIGS / group).rglob("*.yaml")) <= MOST_LEVELS


@pytest.mark.parametrize("experiment", ["ezaudio_xl", "ezaudio_l", "tiny", "demo/denoiser"])
def test_stages_share_all_but_their_row(experiment: str) -> None:
    stages = {
        stage: config(f"experiment={experiment}", f"stage={stage}") for stage in ("pretrain", "align", "finetune")
    }
    components = {stage: OmegaConf.to_container(cfg.task, resolve=True) for stage, cfg in stages.items()}
    assert components["pretrain"]["text"] is None
    assert components["pretrain"]["denoiser"] == {**components["align"]["denoiser"], "context_dim": None}
    steps = {"optimizer": None, "lr_schedule": None}
    assert {**components["align"], **steps} == {**components["finetune"], **steps}
    parts = [components[stage]["masking"]["partial_probability"] for stage in ("pretrain", "align", "finetune")]
    assert parts == [1.0, 0.25, 0.25]
    assert len({cfg.optimizer.lr for cfg in stages.values()}) == (3 if experiment.startswith("ezaudio") else 2)


def test_another_stage_is_refused_by_name() -> None:
    with pytest.raises(InterpolationKeyError, match=r"stages\.scracth\.steps"):
        OmegaConf.to_container(config("experiment=ezaudio_xl", "stage=scracth").trainer, resolve=True)


def test_training_and_scripts_keep_their_files_in_the_same_places() -> None:
    paths = OmegaConf.load(CONFIGS / "paths/default.yaml")
    assert OmegaConf.load(CONFIGS / "train.yaml").paths == paths


SCHEDULES = sorted(file.stem for file in (CONFIGS / "lr_schedule").glob("*.yaml"))


def test_what_an_experiment_sets_of_its_schedule_any_schedule_takes() -> None:
    """So that lr_schedule= may be chosen anew; a value that only one schedule has belongs into a choice of its own."""
    files = [*(CONFIGS / "experiment").rglob("*.yaml"), *(CONFIGS / "debug").rglob("*.yaml")]
    given = {key for file in files for key in OmegaConf.load(file).get("lr_schedule") or {}}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for name in SCHEDULES:
        schedule = instantiate(config("experiment=tiny_vae", f"lr_schedule={name}").lr_schedule)
        assert given <= set(inspect.signature(schedule.func).parameters), name
        assert schedule(optimizer).get_last_lr()[0] <= 1.0


def test_a_codec_ends_at_a_lower_rate_than_a_denoiser() -> None:
    ratios = [config(f"experiment={name}").lr_schedule.final_ratio for name in ("tiny_vae", "tiny")]
    assert ratios == [0.02, 0.05]


def test_ezaudio_warms_up_and_starts_as_the_published_code() -> None:
    cfg = config("experiment=ezaudio_l", "size=tiny", "size.depth=2", "model.context_dim=8")
    assert cfg.lr_schedule.warmup_steps == 5000
    assert float(instantiate(cfg.model).output_layer.conv.weight.detach().abs().min()) > 0
    plain = config("experiment=tiny", "size.depth=2", "model.context_dim=8").model
    assert not instantiate(plain).output_layer.conv.weight.any()


def test_the_published_codec_is_trained_without_what_we_add() -> None:
    published, ours = (config(f"experiment={name}") for name in ("waveform_vae", "waveform_vae_ours"))
    assert (published.data.duration_seconds, ours.data.duration_seconds) == (0.5, 2.0)
    for name in ("data.augmentation", "task.gradient_clip_norm", "callbacks.ema"):
        assert OmegaConf.select(published, name) is None
        assert OmegaConf.select(ours, name) is not None
    assert published.task.discriminator_optimizer.betas == published.optimizer.betas == [0.8, 0.99]


RUNS_ON_GPUS = {
    "ezaudio_xl": 4,
    "audiolcm": 4,
    "audiolcm_teacher": 4,
    "audiolcm_mel_vae": 8,
    "waveform_vae": 8,
    "waveform_vae_ours": 8,
    "bigvgan": 8,
}


def loads_by(cfg: DictConfig) -> tuple[int, bool]:
    return cfg.data.num_workers, cfg.data.pin_memory


@pytest.mark.parametrize(
    "experiment",
    [
        name if name in ("ezaudio_xl", "waveform_vae") else pytest.param(name, marks=pytest.mark.slow)
        for name in RUNS_ON_GPUS
    ],
)
def test_on_gpus_loader_processes_read_into_pinned_memory(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = [[], ["trainer=gpu"], ["trainer=ddp"], ["trainer=fsdp"]]
    assert loads_by(config(f"experiment={experiment}")) == (0, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpus = {loads_by(config(f"experiment={experiment}", *trainer)) for trainer in trainers}
    assert on_gpus == {(RUNS_ON_GPUS[experiment], True)}
    assert loads_by(config(f"experiment={experiment}", "trainer=cpu")) == (0, False)
    assert loads_by(config(f"experiment={experiment}", "trainer=gpu", "data.num_workers=2"))[0] == 2


def test_a_command_without_a_trainer_loads_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loads_by(compose_command("script/encode_latents", "codec_path=x")) == (0, False)


@pytest.mark.parametrize("experiment", ["waveform_vae", "audiolcm_mel_vae", "bigvgan"])
def test_on_gpus_both_optimizers_of_a_codec_skip_bad_steps_without_a_wait(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    task = config(f"experiment={experiment}").task
    assert task.optimizer.fused is task.discriminator_optimizer.fused is True
