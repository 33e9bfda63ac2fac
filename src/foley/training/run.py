"""One training run: from a composed config, and perhaps the weights of an earlier run, to its metrics."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from foley.core.components import ALLOWED_PACKAGES, CheckpointError, compare_states, filled, read_pickle
from foley.core.config import relative_to_checkout
from foley.core.logs import get_logger
from foley.data.datamodule import LatentDataModule
from foley.data.resumable import ResumableDataModule
from foley.models.codec.normaliser import require_channels
from foley.system.checkpoint import FOLEY_KEY, noted_source
from foley.system.system import hashes_of_codec, read_weights
from foley.training.base import FoleyModule
from foley.training.callbacks.checkpointing import SliceEnded, TrainingInterrupted
from foley.training.callbacks.monitoring import AppendingCSVLogger, ParameterCounts
from foley.training.callbacks.non_finite import NonFiniteLossError
from foley.training.checkpoint_io import AtomicCheckpointIO
from foley.training.requirements import is_synthetic, refuse_missing
from foley.training.run_folder import ending, find_checkpoint, resume_command, run_folder
from foley.training.settings import (
    FILES_KEY,
    SETTINGS_KEY,
    file_hashes,
    normaliser_gap,
    portable,
    require_resumable,
    unlike,
)
from foley.training.synthetic import stand_ins
from foley.training.values import require_values

_log = get_logger(__name__)

_COUNTED_IN_STEPS = ("val_check_interval", "limit_train_batches", "limit_val_batches", "overfit_batches")
"""Options of the trainer that count batches of `data.batch_size` clips."""

_TELLS_NOTHING = (
    ".*your dataloader is not resumable.*",  # Lightning looks for state on the loader; ours is on the data module
    ".*treespec, LeafSpec.* is deprecated",  # Lightning's own use of PyTorch
    ".*number of training batches .* is smaller than the logging interval",  # we count steps, across epochs
    ".*Checkpoint directory .* exists and is not empty",  # `run_folder` has seen to it
    ".*module.* in eval mode at the start of training",  # teachers and frozen encoders are
    ".*Using ModelCheckpoint with manual optimization",  # weights after the step are what checkpoints of ours hold
)
_LIGHTNING_ON_ITSELF = "pytorch_lightning.utilities.rank_zero"  # which devices it knows, and what else to install


def train(cfg: DictConfig) -> dict[str, float]:
    """Train as `configs/train.yaml` describes; returns the last value of every metric.

    `cfg.ckpt_path` resumes exactly (a path, or "auto": this output folder's `last.ckpt` where there is one);
    `cfg.ckpt` starts a new run from the weights of an earlier one. Raises SystemExit as `refuse_missing` does, what
    `require_values`, `run_folder`, `require_resumable` and `warm_start` refuse, TrainingInterrupted after Ctrl-C, and
    SliceEnded after `cfg.slice_minutes`.
    """
    require_values(cfg)
    refuse_missing(cfg)
    settings = portable(plain(cfg))
    # A run that is refused here is as it was: its folder notes nothing of this one.
    resume_from = find_checkpoint(cfg.ckpt_path, Path(cfg.paths.output_dir))
    if resume_from:
        require_resumable(resume_from, settings)
    try:
        with run_folder(cfg):
            return _train(cfg, settings, resume_from)
    except BaseException as error:
        if ending(error) == "interrupted":
            why = f"its slice of {cfg.slice_minutes:g} minutes is over; " if isinstance(error, SliceEnded) else ""
            _log.warning("%sthe run in %s goes on with: %s", why, cfg.paths.output_dir, resume_command(cfg))
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            raise TrainingInterrupted from error  # Ctrl-C before the first step
        raise


def _hush_lightning() -> None:
    """Leave out what says nothing of this run, so that what does is seen."""
    for message in _TELLS_NOTHING:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger(_LIGHTNING_ON_ITSELF).setLevel(logging.WARNING)


def _train(cfg: DictConfig, settings: Mapping[str, Any], resume_from: Path | None) -> dict[str, float]:
    _hush_lightning()
    _snapshot(cfg, Path(cfg.paths.output_dir))
    if cfg.trainer.accelerator in ("gpu", "cuda"):
        torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data, _convert_="all")
    _check_data(cfg, datamodule)
    module: FoleyModule = instantiate(_built_task(cfg), _convert_="all")
    module.component_configs |= component_configs(cfg.task)
    module.checkpoint_metadata |= {SETTINGS_KEY: settings, FILES_KEY: file_hashes(module.component_configs)}
    if cfg.codec_path:
        _note_codec(module, datamodule, cfg.codec_path)
    elif isinstance(datamodule, LatentDataModule) and not is_synthetic(cfg):
        _log.warning(
            "no codec_path=: checkpoints of this run will not say which codec made their latents; "
            "sample.py and the export will then ask for codec_path=CODEC"
        )
    module.adopt_data(datamodule)
    if cfg.ckpt and not resume_from and module.takes_weights:
        warm_start(module, cfg.ckpt, cfg.ckpt_allow)
    return _fit(_build_trainer(cfg), module, datamodule, resume_from, settings)


def _fit(
    trainer: pl.Trainer,
    module: FoleyModule,
    datamodule: pl.LightningDataModule,
    resume_from: Path | None,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """Train; whatever ends that, every logger is told."""
    if isinstance(datamodule, ResumableDataModule):
        datamodule.require_a_clip_each(trainer)
        datamodule.say_share(trainer, module.automatic_optimization)
    _rewind(trainer, resume_from)
    try:
        for logger in trainer.loggers:
            logger.log_hyperparams(dict(settings))
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
    except BaseException as error:
        _tell_loggers(trainer, error)
        for callback in trainer.checkpoint_callbacks:
            if interruption := getattr(callback, "interruption", None):
                raise interruption from error
        raise
    _tell_loggers(trainer, None)
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
    _say_how_to_go_on(cfg)
    return optimized_metric(cfg, metrics)


def _say_how_to_go_on(cfg: DictConfig) -> None:
    """The command that trains on, whichever limit ended the run."""
    last, limit = Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt", cfg.trainer.max_steps
    step = read_pickle(last, mmap=True)["global_step"] if last.is_file() else limit
    if cfg.trainer.max_time and not 0 < limit <= step:
        on = resume_command(cfg, {"trainer.max_time": "null"})
        _log.info("trainer.max_time=%s ended it at step %d; without that limit: %s", cfg.trainer.max_time, step, on)
    else:
        on = resume_command(cfg, {"trainer.max_steps": 2 * max(limit, step)})
        _log.info("for twice the steps: %s", on)


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


def _built_task(cfg: DictConfig) -> Any:
    """The task with stored embeddings in the place of the text encoder, where `data.text_dir` names them.

    Checkpoints describe the encoder all the same, with which the trained model is used.
    """
    folder, encoder = (OmegaConf.select(cfg, key) for key in ("data.text_dir", "task.text"))
    if folder is None or encoder is None:
        return cfg.task
    stored = {"_target_": "foley.models.text.StoredText", "_recursive_": False, "directory": folder}
    return {**plain(cfg.task), "text": {**stored, "encoder": plain(encoder)}}


def _check_data(cfg: DictConfig, datamodule: pl.LightningDataModule) -> None:
    """Raise ValueError for less than a batch, or latents of another width than the model's, before a model is built."""
    if isinstance(datamodule, ResumableDataModule):
        datamodule.require_a_batch()
    channels = OmegaConf.select(cfg, "task.normaliser.channels")
    if isinstance(datamodule, LatentDataModule) and channels is not None:
        require_channels(len(datamodule.index.latent_mean), channels)


def _note_codec(module: FoleyModule, datamodule: pl.LightningDataModule, codec_path: str) -> None:
    """Store where the codec is, as seen from the checkout; raises StaleCacheError where it did not make the latents."""
    if isinstance(datamodule, LatentDataModule):
        known, own = hashes_of_codec(codec_path), datamodule.codec_hash
        datamodule.require_codec(own if own in known else min(known))
    module.checkpoint_metadata["codec_dir"] = noted_source(codec_path)


def _build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Callbacks and loggers are dictionaries in the config, so that `callbacks.ema=null` takes one out."""
    callbacks, loggers = (
        [instantiate(config, _convert_="all") for config in _active(group)] for group in (cfg.callbacks, cfg.logger)
    )
    if cfg.trainer.get("enable_model_summary", True):
        callbacks.append(ParameterCounts())
    # A logger that uploads every checkpoint at once must find it.
    saving = AtomicCheckpointIO(background=all(getattr(logger, "_log_model", False) != "all" for logger in loggers))
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[saving],
        **_batch_counts(cfg.trainer),
        _convert_="all",
    )
    return trainer


def _batch_counts(trainer: DictConfig) -> dict[str, int]:
    """In batches, as Lightning counts them, what the config counts in steps; a share of an epoch is one of either."""
    counts = {name: trainer.get(name) for name in _COUNTED_IN_STEPS}
    batches = trainer.get("accumulate_grad_batches", 1)
    return {name: count * batches for name, count in counts.items() if isinstance(count, int)}


@rank_zero_only
def _rewind(trainer: pl.Trainer, resume_from: Path | None) -> None:
    """Drop what an earlier life of the run logged after the checkpoint that this one goes on from."""
    step = read_pickle(resume_from, mmap=True)["global_step"] if resume_from else 0
    for logger in trainer.loggers:
        if isinstance(logger, AppendingCSVLogger):
            logger.rewind(step)
        elif isinstance(logger, TensorBoardLogger) and resume_from:
            logger._kwargs["purge_step"] = step  # which hides what lies beyond it


@rank_zero_only
def _tell_loggers(trainer: pl.Trainer, error: BaseException | None) -> None:
    """Log how the run has ended; a W&B run that stayed open would also take in the next run of a sweep."""
    status = ending(error)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("status", status if error is None else f"{status}: {error!r}")
            logger.experiment.close()
        elif isinstance(logger, WandbLogger):
            logger.experiment.summary["status"] = status
            logger.experiment.finish(exit_code=_EXIT_CODES[status])


_EXIT_CODES = {"finished": 0, "crashed": 1, "interrupted": 255}  # as W&B understands them


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


def warm_start(module: FoleyModule, path: str | Path, allow: Sequence[str] = ()) -> WarmStartReport:
    """Load the (averaged) weights of `path`, by any name that `read_weights` takes, into `module` where names agree.

    The rest is logged. The optimizer starts afresh, the latent normaliser is the earlier run's.

    Args:
        allow: differences in meaning that are intended: a component, or an option of one, such as "process.prediction".

    Raises CheckpointError where no name agrees, a shape differs, or the weights mean another thing here: latents of
    another codec, another text encoder or tokenizer, prediction type, normaliser, or option of the network.
    """
    checkpoint = read_weights(path, module.component_configs, module.checkpoint_metadata.get("codec_hash"))
    saved, own = checkpoint["state_dict"], module.saved_state(module.state_dict())
    states = compare_states(saved, own)
    if states.reshaped or not states.common:
        raise CheckpointError(
            f"ckpt={path} cannot start this run: "
            + ("; ".join(states.reshaped) or "no parameter has the same name")
            + ". Choose the model config of the earlier run."
        )
    _require_same_meaning(path, checkpoint, module, states.common, allow)
    with torch.no_grad():
        for key in states.common:  # one after the other: every process of a node does this
            own[key].copy_(filled(saved[key], checkpoint["path"]))
    report = WarmStartReport(tuple(states.common), tuple(states.missing), tuple(states.unexpected))
    _log.info("warm start from %s: %d tensors loaded", path, len(report.loaded))
    for kind, keys in (("new (initial values kept)", report.new), ("dropped", report.dropped)):
        if keys:
            _log.warning("warm start: %d tensors %s: %s", len(keys), kind, ", ".join(keys))
    return report


def _require_same_meaning(
    path: str | Path, checkpoint: Mapping[str, Any], module: FoleyModule, common: Sequence[str], allow: Sequence[str]
) -> None:
    """Raise CheckpointError with every difference that is not among those allowed."""
    described, own = checkpoint[FOLEY_KEY], module.description()
    found = unlike(described, own, common)
    codecs = described.get("codec_hash"), own.get("codec_hash")
    if all(codecs) and codecs[0] != codecs[1]:
        found.append(("codec", f"latents of codec {codecs[0]}", f"those of codec {codecs[1]}"))
    if not all(codecs):  # of one codec the weights know their own statistics, which published ones leave at 0 and 1
        statistics = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("normaliser.")}
        gap = normaliser_gap(filled(statistics, checkpoint["path"]), module.state_dict())
        if gap > _LARGEST_GAP:
            found.append(("normaliser", "its statistics", f"statistics of the data that are {gap:.1f} deviations away"))
    refused = []
    for key, before, now in found:
        if any(f"{key}.".startswith(f"{name}.") for name in allow):
            _log.warning("warm start: %s is %s in %s, and %s in this run, as ckpt_allow has it", key, before, path, now)
        else:
            refused.append((key, before, now))
    if refused:
        lines = [f"  {key}: {before} in the checkpoint, {now} in this run" for key, before, now in refused]
        raise CheckpointError(
            "\n".join([f"the weights of ckpt={path} mean another thing in this run:", *lines])
            + "\nSet these as in the earlier run, or, where the change is intended, "
            + f"ckpt_allow=[{','.join(dict.fromkeys(key for key, _, _ in refused))}]"
        )


_LARGEST_GAP = 1.0  # between latent statistics: a whole standard deviation is another normaliser, not other sounds
