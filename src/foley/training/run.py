"""One training run: from a composed config, and perhaps the weights of an earlier run, to its metrics."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from foley.core.components import ALLOWED_PACKAGES, CheckpointError, compare_states
from foley.core.config import PROJECT_ROOT, relative_to_checkout
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.data.datamodule import LatentDataModule
from foley.system.checkpoint import FOLEY_KEY, load_trained, read_training_checkpoint
from foley.training.base import FoleyModule
from foley.training.callbacks.checkpointing import AtomicCheckpointIO
from foley.training.callbacks.non_finite import NonFiniteLossError
from foley.training.requirements import is_synthetic, refuse_missing
from foley.training.run_folder import resume_command
from foley.training.synthetic import stand_ins

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
    module: FoleyModule = instantiate(cfg.task, _convert_="all")
    module.component_configs |= component_configs(cfg.task)
    if cfg.codec_path:
        _note_codec(module, datamodule, cfg.codec_path)
    module.adopt_data(datamodule)
    if cfg.ckpt and not resume_from:
        warm_start(module, Path(cfg.ckpt))
    trainer = _build_trainer(cfg)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain(cfg))
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
    finally:
        _finish_wandb(trainer)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def objective(cfg: DictConfig) -> float | None:
    """Train, with a word on where, and how to go on; gives a sweep its number, infinite where training diverged.

    With `data=synthetic` it measures what a step costs instead, as `foley.training.synthetic` describes.
    """
    if is_synthetic(cfg):
        train(stand_ins(cfg))
        return None
    _log.info("output folder: %s", cfg.paths.output_dir)
    _log.info("after a stop it goes on with: %s", resume_command(cfg))
    _warn_of_warm_up(cfg)
    try:
        metrics = train(cfg)
    except NonFiniteLossError as error:
        if not cfg.optimized_metric:
            raise
        _log.warning("counted as the worst: %s", error)
        return math.inf
    _log.info("trained; all of it is in %s", cfg.paths.output_dir)
    _log.info("more steps, with a larger trainer.max_steps=: %s", resume_command(cfg))
    return optimized_metric(cfg, metrics)


def _warn_of_warm_up(cfg: DictConfig) -> None:
    steps, warm_up = cfg.trainer.max_steps, OmegaConf.select(cfg, "lr_schedule.warmup_steps") or 0
    if 0 < steps <= warm_up:
        _log.warning(
            "the run ends inside its warm-up: with trainer.max_steps=%d and lr_schedule.warmup_steps=%d the learning "
            "rate reaches %.0f%%; set lr_schedule.warmup_steps=%d or so",
            *(steps, warm_up, 100 * steps / warm_up, steps // 10),
        )


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


def _note_codec(module: FoleyModule, datamodule: pl.LightningDataModule, codec_path: str) -> None:
    """Store where the codec is, as seen from the checkout; raises StaleCacheError where it did not make the latents."""
    if isinstance(datamodule, LatentDataModule):
        datamodule.require_codec(hash_module(load_trained(Path(codec_path), "codec")))
    module.checkpoint_metadata["codec_dir"] = os.path.relpath(codec_path, PROJECT_ROOT)


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


def warm_start(module: FoleyModule, path: Path) -> WarmStartReport:
    """Load the (averaged) weights of `path`, a .ckpt or a run's folder, into `module` where the names agree.

    The rest is logged. The optimizer starts afresh, the latent normaliser is the earlier run's.
    Raises CheckpointError where no name agrees, a shape differs, or the latents come from another codec.
    """
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    checkpoint = read_training_checkpoint(path)
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


def _check_codec(path: Path, saved: str | None, own: str | None) -> None:
    if saved and own and saved != own:
        raise CheckpointError(
            f"ckpt={path} was trained on latents of codec {saved}, this run's latents are of codec {own}; "
            "encode the data with the earlier codec, or train from the beginning"
        )
