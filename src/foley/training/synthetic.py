"""A recipe on random data: what a step of it costs on this machine, with no data and no weights (`data=synthetic`).

Whatever a recipe would read is replaced by noise of its true shape: latents or audio, the embeddings of a frozen text
encoder, a teacher. What is trained is the recipe's own. `foley.training.callbacks.cost` measures.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.utils.data import Dataset

from foley.core.channels import channels_of
from foley.core.components import build_component
from foley.core.config import CONFIG_DIR, compose_aside
from foley.core.logs import get_logger
from foley.core.rates import clip_size
from foley.core.seeding import torch_generator
from foley.data.datamodule import LatentDataModule
from foley.data.dataset import AudioCollate, AudioItem, SampleKey
from foley.data.latent_format import LatentClips, LatentEntry, LatentLayout
from foley.data.latents import LatentCacheIndex, LatentCollate, LatentItem
from foley.data.preferences import PairCollate, PairItem, PreferenceDataModule, Preferences
from foley.data.resumable import ResumableDataModule
from foley.system.system import load_system, untrained_system
from foley.training.distillation import Teacher
from foley.training.requirements import gpu_memory_gib

_log = get_logger(__name__)

_CAPTION = "a man speaks while a dog barks and rain falls on a tin roof"
_BATCHES = 1000  # in an epoch, so that a measurement stays inside one
_SILENT = ("adapters", "audio_samples", "evaluation", "reconstructions", "checkpoint", "best", "throughput")
"""Callbacks that have nothing to do in a measurement."""


class _Copies(Dataset[Any]):
    """One item, as often as asked: drawing noise for each would be measured too."""

    def __init__(self, item: AudioItem | LatentItem | PairItem, size: int) -> None:
        self.item, self.size = item, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey | int) -> AudioItem | LatentItem | PairItem:
        return self.item


class SyntheticLatents(LatentDataModule):
    """Batches of one random latent of unit variance, of no codec in particular.

    Args:
        channels, hop_samples, sample_rate_hz: of the codec whose latents these stand for.
        duration_seconds, batch_size, seed: as for `LatentDataModule`.
    """

    def __init__(
        self,
        channels: int,
        hop_samples: int,
        sample_rate_hz: int,
        duration_seconds: float,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        ResumableDataModule.__init__(self, batch_size, seed=seed)
        self.duration_seconds = duration_seconds
        _, self.num_frames = clip_size(duration_seconds, sample_rate_hz, hop_samples)
        entry = LatentEntry("synthetic", _CAPTION, "", "train", "", 0, self.num_frames, duration_seconds)
        layout = LatentLayout("", sample_rate_hz, hop_samples, channels, "sample", ("train",))
        unit = [0.0] * channels, [1.0] * channels
        self.index = LatentCacheIndex("synthetic", layout, *unit, [], LatentClips.of([entry], ["train"], [""]))
        latent = torch.randn(channels, self.num_frames, generator=torch_generator("synthetic", seed))
        self.collate = LatentCollate(self.num_frames)
        self.datasets = {"train": _Copies(LatentItem(latent, _CAPTION, "", "synthetic"), _BATCHES * batch_size)}

    def setup(self, stage: str) -> None:
        """Nothing is validated in a measurement, and nothing is missed."""


class SyntheticPairs(SyntheticLatents, PreferenceDataModule):
    """Pairs of such latents, winner and loser of one caption; arguments as for `SyntheticLatents`."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.preferences = Preferences("synthetic", ())
        winner, size = self.datasets["train"][0], _BATCHES * self.batch_size
        loser = replace(winner, latent=torch.randn(winner.latent.shape, generator=torch_generator("loser", self.seed)))
        self.collate = PairCollate(LatentCollate(self.num_frames))
        self.datasets = {"train": _Copies(PairItem(winner, loser), size)}


class SyntheticClips(ResumableDataModule):
    """Batches of one clip of quiet noise; arguments as for `AudioDataModule`."""

    def __init__(
        self, sample_rate_hz: int, duration_seconds: float, batch_size: int, seed: int = 0, channels: int = 1
    ) -> None:
        super().__init__(batch_size, seed=seed)
        num_samples = round(duration_seconds * sample_rate_hz)
        audio: Tensor = 0.1 * torch.randn(channels, num_samples, generator=torch_generator("synthetic", seed))
        self.collate = AudioCollate(num_samples)
        self.datasets = {"train": _Copies(AudioItem(audio, _CAPTION, "", "synthetic"), _BATCHES * batch_size)}

    def setup(self, stage: str) -> None:
        """Nothing is validated in a measurement, and nothing is missed."""


def random_teacher(experiment: str) -> Teacher:
    """An untrained teacher of the shapes that `configs/experiment/<experiment>.yaml` trains."""
    composed = compose_aside("train", [f"experiment={experiment}"])
    with open_dict(composed):
        composed.text = _random_text(composed.get("text"))
    return Teacher(untrained_system(composed), set())


def stored_teacher(path: str, with_codec: bool = False) -> Teacher:
    """A teacher that is at hand, for latents of any codec."""
    return Teacher(load_system(Path(path), with_codec=with_codec), set())


def stand_ins(cfg: DictConfig) -> DictConfig:
    """A copy of a recipe with `data=synthetic` in which everything that it would read is replaced.

    A recipe for GPUs is measured on the CPU where there are none, with one clip in a batch. Adversarial terms take part
    from the first step. Raises ValueError for a teacher that is neither there nor of known shapes.
    """
    cfg = cfg.copy()
    with open_dict(cfg):
        _keep_to_the_device(cfg)
        cfg.text, cfg.codec_path = _random_text(cfg.get("text")), None
        if "adversarial_start_step" in cfg.task:
            cfg.task.adversarial_start_step = 0
        if cfg.task.get("prior"):  # which is made once, before the steps that are measured
            cfg.task.prior.update({"captions": [_CAPTION], "count": 1, "num_steps": 1})
        codec = _stand_in_teacher(cfg) if _distils_or_controls(cfg) else _on_meta(cfg.codec)
        cfg.ckpt = None
        _measure(cfg)
        cfg.data = _data(cfg, codec)
    return cfg


def _keep_to_the_device(cfg: DictConfig) -> None:
    if cfg.trainer.accelerator in ("gpu", "cuda") and gpu_memory_gib() is None:
        _log.warning("there is no GPU here: measured on the CPU, with one clip in a batch, in single precision")
        cfg.trainer.update(
            {
                "accelerator": "cpu",
                "devices": 1,
                "strategy": "auto",
                "precision": "32-true",
                "accumulate_grad_batches": 1,
            }
        )
        cfg.data.batch_size = 1


def _random_text(text: DictConfig | None) -> DictConfig | None:
    """An encoder that needs no files is kept: it is part of what is trained."""
    if text is None or text._target_.endswith("SmallTextEncoder"):
        return text
    target = "foley.models.text.frozen_t5.RandomEmbeddings"
    return OmegaConf.create({"_target_": target, "dim": text.dim, "max_length": text.max_length})


def _stand_in_teacher(cfg: DictConfig) -> Any:
    """Put in a teacher: the one named, or an untrained one of an experiment's shapes. Returns a codec of its shapes."""
    trains_adapters = cfg.task._target_.endswith(".LoraTraining")  # of `ckpt`, whose codec is asked for its rates
    option = "ckpt" if trains_adapters else "system"
    system = None if OmegaConf.is_missing(cfg, option) or cfg.get(option) is None else str(cfg[option])
    cfg.pop("system", None)
    role = "teacher" if "teacher" in cfg.task else "base"
    if system is not None and Path(system).exists():
        cfg.task[role] = {"_target_": f"{__name__}.stored_teacher", "path": system, "with_codec": trains_adapters}
        if "codec" in cfg.task:
            cfg.task.codec.source = system
        return load_system(Path(system)).modules["codec"]
    experiment = system or cfg.data[role]
    if not (CONFIG_DIR / f"experiment/{experiment}.yaml").is_file():
        raise ValueError(
            f"{option}={system} does not exist, nor does experiment={experiment}, whose shapes it could have"
        )
    _log.info("the teacher has random weights, in the shapes of experiment=%s", experiment)
    cfg.task[role] = {"_target_": f"{__name__}.random_teacher", "experiment": experiment}
    codec = compose_aside("train", [f"experiment={experiment}"]).codec
    if "codec" in cfg.task:
        cfg.task.codec = OmegaConf.to_container(codec, resolve=True)
    return _on_meta(codec)


def _distils_or_controls(cfg: DictConfig) -> bool:
    return "teacher" in cfg.task or "base" in cfg.task


def _on_meta(codec: DictConfig) -> Any:
    """The codec without its weights, to ask for its shapes."""
    config: Any = OmegaConf.to_container(codec, resolve=True)
    with torch.device("meta"):
        return build_component(config)


def _measure(cfg: DictConfig) -> None:
    """Nothing but steps, and those who watch them."""
    for name in _SILENT:
        cfg.callbacks[name] = None
    limit, warm_up = cfg.trainer.max_steps, max(1, cfg.data.warmup_steps)
    measured = min(cfg.data.steps, limit) if limit > 0 else cfg.data.steps
    _log.info("measures %d steps, after %d that are not counted", measured, warm_up)
    cfg.callbacks.cost = {
        "_target_": "foley.training.callbacks.cost.StepCost",
        **{"steps": measured, "warmup_steps": warm_up, "max_seconds": cfg.data.max_seconds},
        "output_dir": cfg.paths.output_dir,
        "name": cfg.name,
        "clip_seconds": cfg.data.duration_seconds,
        "run_steps": limit,
    }
    # The learning rate's schedule is the recipe's, the run is only as long as the measurement.
    schedule: Any = OmegaConf.to_container(cfg.lr_schedule, resolve=True)
    if "total_steps" in schedule:  # which no measurement reaches, whatever the rate is on its way
        schedule["total_steps"] = max(schedule["total_steps"], schedule["warmup_steps"] + 1)
    cfg.lr_schedule = schedule
    cfg.trainer.update({"max_steps": measured + warm_up, "max_time": None, "limit_val_batches": 0})


def _data(cfg: DictConfig, codec: Any) -> dict[str, Any]:
    shared = {key: cfg.data[key] for key in ("duration_seconds", "batch_size", "seed")}
    shared["sample_rate_hz"] = codec.sample_rate_hz
    if "denoiser" not in cfg.task and not _distils_or_controls(cfg):
        return {"_target_": f"{__name__}.SyntheticClips", **shared, "channels": channels_of(codec)}
    sizes = {"channels": codec.latent_channels, "hop_samples": codec.hop_samples}
    kind = "SyntheticPairs" if cfg.task._target_.endswith(".PreferenceTuning") else "SyntheticLatents"
    return {"_target_": f"{__name__}.{kind}", **sizes, **shared}
