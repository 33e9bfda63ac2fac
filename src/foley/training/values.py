"""What the settings of a training run may be, looked at before anything is made or loaded.

Nothing here imports what takes time.
"""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foley.core.numbers import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, NumberRange
from foley.training.requirements import is_synthetic

_WHOLE = NumberRange(least=0, whole=True)

NUMBERS: dict[str, tuple[NumberRange, tuple[int | None, ...]]] = {
    "seed": (SEED, ()),
    "gpu_memory_gib": (POSITIVE, (None,)),
    "optimizer.lr": (POSITIVE, ()),
    "optimizer.weight_decay": (NOT_NEGATIVE, ()),
    "optimizer.eps": (POSITIVE, ()),
    "task.discriminator_optimizer.lr": (POSITIVE, ()),
    "lr_schedule.warmup_steps": (_WHOLE, ()),
    "lr_schedule.total_steps": (NumberRange(least=-1, whole=True), ()),
    "lr_schedule.final_ratio": (SHARE, ()),
    "lr_schedule.inv_gamma": (POSITIVE, ()),
    "lr_schedule.power": (NOT_NEGATIVE, ()),
    "trainer.max_steps": (COUNT, (-1,)),  # -1: until max_time
    "trainer.val_check_interval": (POSITIVE, (None,)),
    "trainer.check_val_every_n_epoch": (COUNT, (None,)),
    "trainer.limit_train_batches": (NOT_NEGATIVE, (None,)),
    "trainer.limit_val_batches": (NOT_NEGATIVE, (None,)),
    "task.gradient_clip_norm": (POSITIVE, (None,)),
    "task.text_rate": (NOT_NEGATIVE, ()),
    "trainer.accumulate_grad_batches": (COUNT, ()),
    "trainer.log_every_n_steps": (_WHOLE, ()),
    "callbacks.ema.decay": (SHARE, ()),
    "callbacks.non_finite.max_consecutive": (COUNT, ()),
    "callbacks.checkpoint.every_n_train_steps": (COUNT, ()),
    "slice_minutes": (POSITIVE, (None,)),
    "callbacks.progress.log_every_seconds": (NOT_NEGATIVE, ()),
    "data.batch_size": (COUNT, ()),
    "data.channels": (COUNT, ()),
    "data.duration_seconds": (POSITIVE, (None,)),
    "data.num_workers": (_WHOLE, ()),
    "data.steps": (COUNT, ()),
    "data.warmup_steps": (_WHOLE, ()),
    "data.max_seconds": (POSITIVE, ()),
}
"""Dotted key to the numbers that it takes, and what it takes besides; a recipe without the key is not asked for it."""

_OF_THE_MACHINE = ("data.num_workers", "optimizer.fused")
"""What follows from the machine unless it is typed: right then, and to ask for it would load PyTorch."""

_ABSENT = object()


def require_values(cfg: DictConfig) -> None:
    """Raise ValueError, which names the option and what it takes, for the first that no run can begin with."""
    _require_stage(cfg)
    _require_sections(cfg)
    for key, (numbers, besides) in NUMBERS.items():
        if key in _OF_THE_MACHINE and not _is_typed(cfg, key):
            continue
        value = _value(cfg, key)
        if value is not _ABSENT and value not in besides:
            numbers.check(key, value)
    if _value(cfg, "data.text_dir") not in (_ABSENT, None) and _value(cfg, "task.text") is None:
        raise ValueError(f"data.text_dir={_value(cfg, 'data.text_dir')}: this run has no text; leave it out")
    _require_own_clipping(cfg)
    compiled, products = _value(cfg, "compile"), _value(cfg, "float32_matmul_precision")
    if compiled not in (_ABSENT, None, False) and _value(cfg, "task.compile") is _ABSENT:
        raise ValueError(f"compile={compiled}: only denoisers are compiled, and this recipe trains none; leave it out")
    if products not in (_ABSENT, "highest", "high", "medium"):
        raise ValueError(f"float32_matmul_precision={products}: give highest, high or medium")
    max_time = _value(cfg, "trainer.max_time")
    if isinstance(max_time, str | int | float) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(max_time).strip()):
        raise ValueError(f"trainer.max_time={max_time}: give DD:HH:MM:SS, such as 00:01:30:00, or null")
    total, warm_up = _value(cfg, "lr_schedule.total_steps"), _value(cfg, "lr_schedule.warmup_steps")
    if total is not _ABSENT and not is_synthetic(cfg):  # a measurement ends before any schedule
        require_an_end(total, 0 if warm_up is _ABSENT else warm_up)


def require_an_end(total_steps: int, warmup_steps: int) -> None:
    """Raise ValueError where a cosine that ends at `total_steps` would have none, or no step after its warm-up."""
    if total_steps < 1:
        raise ValueError(
            f"lr_schedule.total_steps={total_steps}, that is trainer.max_steps, gives a cosine no end: set "
            "trainer.max_steps, or choose lr_schedule=constant"
        )
    if total_steps <= warmup_steps:
        raise ValueError(
            f"lr_schedule.warmup_steps={warmup_steps} leaves nothing of lr_schedule.total_steps={total_steps}, that is "
            f"trainer.max_steps: lower it by {warmup_steps - total_steps + 1} at least, as by "
            f"lr_schedule.warmup_steps={total_steps // 10}, or set trainer.max_steps above it"
        )


def _value(cfg: DictConfig, key: str) -> Any:
    """What the option comes to; `_ABSENT` where the recipe has none, or it refers to what is missing."""
    try:
        return OmegaConf.select(cfg, key, default=_ABSENT)
    except OmegaConfBaseException:  # `refuse_missing` says so
        return _ABSENT


def _is_typed(cfg: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    options = OmegaConf.select(cfg, section)
    # `in` would resolve it.
    given = isinstance(options, DictConfig) and name in [*options.keys()]
    return given and not OmegaConf.is_interpolation(options, name)


def _require_stage(cfg: DictConfig) -> None:
    stages, stage = _value(cfg, "stages"), _value(cfg, "stage")
    if isinstance(stages, Mapping) and stage not in stages:
        raise ValueError(f"stage={stage}: there is no such stage; this recipe has {', '.join(map(str, stages))}")


def _require_own_clipping(cfg: DictConfig) -> None:
    """Lightning refuses to clip what a fused optimizer steps by, and gradients that are still scaled have no norm."""
    clip = _value(cfg, "trainer.gradient_clip_val")
    if clip not in (_ABSENT, None):
        raise ValueError(f"trainer.gradient_clip_val={clip}: the task clips; give task.gradient_clip_norm={clip}")
    precision = _value(cfg, "trainer.precision")
    if _is_typed(cfg, "optimizer.fused") and cfg.optimizer.fused and str(precision).startswith("16"):
        raise ValueError(
            f"optimizer.fused=true with trainer.precision={precision}: a fused optimizer takes the scale out of the "
            "gradients itself, after they are clipped; leave optimizer.fused out, or train in bf16-mixed"
        )


def _require_sections(cfg: DictConfig) -> None:
    """Text in the place of a section would be called as if it were an object, or be left out without a word."""
    named = {f"{group}.{name}" for group in ("callbacks", "logger") for name in cfg.get(group) or ()}
    for key in ("optimizer", "paths", *sorted(named)):
        value = OmegaConf.select(cfg, key, default={})
        if not isinstance(value, Mapping) and (key not in named or value is not None):
            example = "optimizer.lr=1e-4" if key == "optimizer" else f"{key}.OPTION=VALUE"
            also = f", or {key}=null, which leaves it out" if key in named else ""
            raise ValueError(f"{key}={value}: {key} has settings of its own: set one of them, as by {example}{also}")
