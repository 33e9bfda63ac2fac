"""One training run: from a composed config, and perhaps the weights of an earlier run, to its metrics."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from foley.core.components import ALLOWED_PACKAGES, CheckpointError, compare_states
from foley.core.config import relative_to_checkout
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.data.datamodule import LatentDataModule
from foley.models.codec.normaliser import require_channels
from foley.system.checkpoint import FOLEY_KEY, load_trained, noted_source
from foley.system.system import read_weights
from foley.training.base import FoleyModule
from foley.training.callbacks.checkpointing import AtomicCheckpointIO

_log = get_logger(__name__)

# Lightning looks for state on the loader; ours is on the data module.
warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")


def train(cfg: DictConfig) -> dict[str, float]:
    """Train as `configs/train.yaml` describes; returns the last value of every metric.

    `cfg.ckpt_path` resumes exactly (a path, or "auto": this output folder's `last.ckpt` where there is one);
    `cfg.ckpt` starts a new run from the weights of an earlier one. Raises SystemExit as `refuse_missing` does.
    """
    refuse_missing(cfg)
    output_dir = Path(cfg.paths.output_dir)
    resume_from = find_checkpoint(cfg.ckpt_path, output_dir)
    _snapshot(cfg, output_dir)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data, _convert_="all")
    _check_width(cfg, datamodule)
    module: FoleyModule = instantiate(cfg.task, _convert_="all")
    module.component_configs |= component_configs(cfg.task)
    if cfg.codec_path:
        _note_codec(module, datamodule, cfg.codec_path)
    elif isinstance(datamodule, LatentDataModule):
        _log.warning(
            "no codec_path=: checkpoints of this run will not say which codec made their latents; "
            "sample.py and the export will then ask for codec_path=CODEC"
        )
    module.adopt_data(datamodule)
    if cfg.ckpt and not resume_from:
        warm_start(module, cfg.ckpt)
    trainer = _build_trainer(cfg)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain(cfg))
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
    finally:
        _finish_wandb(trainer)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


_MADE_BY = {
    "data.cache_dir": "a folder of latents, made by: foley encode codec_path=CODEC data=manifest "
    "data.splits.manifest=FILE output_dir=FOLDER",
    "data.splits": "clips: data=manifest data.splits.manifest=FILE, data=shards data.splits.url=FOLDER, data=demo, ...",
    "data.splits.manifest": "a CSV or JSONL file with `path` and `caption`, made by: foley prepare --help, or by hand",
    "data.splits.url": "a folder or URL of shards, made by: foley shards manifest=FILE output=FOLDER",
    "system": "the teacher: a system's folder, a .ckpt, or the name of a published system",
    "text.directory": "a folder of precomputed features, <clip id>.safetensors",
    "callbacks.evaluation.reference": "real clips to compare with: a folder or a manifest",
}
"""What stands for `???` in a recipe, and the command that makes it."""


def refuse_missing(cfg: DictConfig) -> None:
    """Raise SystemExit with one line for each value that the recipe leaves to the user; nothing has been loaded yet."""
    missing = list(_missing(OmegaConf.to_container(cfg, resolve=False)))
    if missing:
        lines = [f"  {key}=...  {_MADE_BY.get(key, 'see its comment in configs/')}" for key in missing]
        raise SystemExit("\n".join([f"{cfg.name or 'this run'} cannot train yet; it lacks", *lines]))


def _missing(node: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values that are `???` themselves, not those that refer to one."""
    if node == "???":
        yield name
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{name}.{key}".lstrip("."))


def optimized_metric(cfg: DictConfig, metrics: Mapping[str, float]) -> float | None:
    """The number a sweep minimises, `cfg.optimized_metric`; raises KeyError where the run did not log it."""
    if not cfg.optimized_metric:
        return None
    if cfg.optimized_metric not in metrics:
        raise KeyError(f"optimized_metric={cfg.optimized_metric} was not logged; this run logged {sorted(metrics)}")
    value = metrics[cfg.optimized_metric]
    return value if math.isfinite(value) else math.inf


def plain(config: DictConfig) -> Any:
    """The resolved config as plain dicts, lists, strings and numbers."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def component_configs(task: DictConfig) -> dict[str, dict[str, Any]]:
    """The sub-configs of a task that build components of this package, by name; partials are not components.

    Files inside the checkout are named relative to it, so that a checkpoint still loads where the checkout moved.
    """
    return {
        name: {key: relative_to_checkout(value) for key, value in config.items()}
        for name, config in plain(task).items()
        if isinstance(config, dict)
        and str(config.get("_target_", "")).startswith(ALLOWED_PACKAGES)
        and not config.get("_partial_", False)
    }


def find_checkpoint(ckpt_path: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from; raises CheckpointError where a named one is absent."""
    if not ckpt_path:
        return None
    path = output_dir / "checkpoints" / "last.ckpt" if ckpt_path == "auto" else Path(ckpt_path)
    if path.is_file():
        return path
    if ckpt_path == "auto":
        _log.info("ckpt_path=auto: no checkpoint at %s yet, starting from the beginning", path)
        return None
    raise CheckpointError(f"ckpt_path={ckpt_path} does not exist; give a .ckpt file, or auto")


def _check_width(cfg: DictConfig, datamodule: pl.LightningDataModule) -> None:
    """Raise ValueError for latents of another width than the model's, before a text encoder is loaded."""
    channels = OmegaConf.select(cfg, "task.normaliser.channels")
    if isinstance(datamodule, LatentDataModule) and channels is not None:
        require_channels(len(datamodule.index.latent_mean), channels)


def _note_codec(module: FoleyModule, datamodule: pl.LightningDataModule, codec_path: str) -> None:
    """Store where the codec is, as seen from the checkout; raises StaleCacheError where it did not make the latents."""
    if isinstance(datamodule, LatentDataModule):
        datamodule.require_codec(hash_module(load_trained(codec_path, "codec")))
    module.checkpoint_metadata["codec_dir"] = noted_source(codec_path)


def _build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Callbacks and loggers are dictionaries in the config, so that `callbacks.ema=null` takes one out."""
    callbacks, loggers = (
        [instantiate(config, _convert_="all") for config in _active(group)] for group in (cfg.callbacks, cfg.logger)
    )
    trainer: pl.Trainer = instantiate(
        cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()], _convert_="all"
    )
    return trainer


@rank_zero_only
def _finish_wandb(trainer: pl.Trainer) -> None:
    """End the W&B run, which would otherwise take in the next run of a sweep."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _active(group: DictConfig | None) -> list[DictConfig]:
    """The entries of a group that build something; a setting of an entry taken out (`ema: null`) builds nothing."""
    return [config for config in (group or {}).values() if config and "_target_" in config]


@rank_zero_only
def _snapshot(cfg: DictConfig, output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)


@dataclass(frozen=True)
class WarmStartReport:
    """Keys taken over, keys only this run has (they keep their initial values), and keys only the old run has."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


def warm_start(module: FoleyModule, path: str | Path) -> WarmStartReport:
    """Load the (averaged) weights of `path`, by any name that `read_weights` takes, into `module` where names agree.

    The rest is logged. The optimizer starts afresh, the latent normaliser is the earlier run's.
    Raises CheckpointError where no name agrees, a shape differs, or the latents come from another codec.
    """
    checkpoint = read_weights(path, module.component_configs, module.checkpoint_metadata.get("codec_hash"))
    saved = checkpoint["state_dict"]
    _check_codec(path, checkpoint[FOLEY_KEY].get("codec_hash"), module.checkpoint_metadata.get("codec_hash"))
    states = compare_states(saved, module.saved_state(module.state_dict()))
    if states.reshaped or not states.common:
        raise CheckpointError(
            f"ckpt={path} cannot start this run: "
            + ("; ".join(states.reshaped) or "no parameter has the same name")
            + ". Choose the model config of the earlier run."
        )
    module.load_state_dict({key: saved[key] for key in states.common}, strict=False)  # the rest is reported below
    report = WarmStartReport(tuple(states.common), tuple(states.missing), tuple(states.unexpected))
    _log.info("warm start from %s: %d tensors loaded", path, len(report.loaded))
    for kind, keys in (("new (initial values kept)", report.new), ("dropped", report.dropped)):
        if keys:
            _log.warning("warm start: %d tensors %s: %s", len(keys), kind, ", ".join(keys))
    return report


def _check_codec(path: str | Path, saved: str | None, own: str | None) -> None:
    if saved and own and saved != own:
        raise CheckpointError(
            f"ckpt={path} was trained on latents of codec {saved}, this run's latents are of codec {own}; "
            "encode the data with the earlier codec, or train from the beginning"
        )
