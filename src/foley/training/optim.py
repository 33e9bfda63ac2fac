"""Parameter groups and learning-rate schedules; optimizers and schedules reach the modules as Hydra partials."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from foley.training.values import require_an_end

_TABLE_NAMES = ("table", "embedding", "token", "vector")  # of parameters with two axes that are no matrices


def parameter_groups(*modules: nn.Module, slowed: Sequence[nn.Module] = (), rate: float = 1.0) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: matrices and kernels decay; biases, norms and tables do not.

    Those of the second kind have a `weight_decay` of zero; the first take the optimizer's own.

    Args:
        slowed: parts of `modules` that learn at `rate` times the optimizer's learning rate, in groups of their own,
            which say so; `scale_rates` then sets it.
    """
    slow = {parameter for part in slowed for parameter in part.parameters()} if rate != 1 else set()
    groups: list[dict[str, Any]] = [
        {"params": [], **options, **pace} for pace in ({}, {"rate": rate}) for options in ({}, {"weight_decay": 0.0})
    ]
    for owner, name, parameter in _trainable(*modules):
        groups[2 * (parameter in slow) + (not _decays(owner, name, parameter))]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def scale_rates(optimizer: Optimizer) -> Optimizer:
    """`optimizer` with the learning rates that `parameter_groups` asks for."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("rate", 1.0)
    return optimizer


def _trainable(*modules: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()
    for module in modules:
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:  # a shared parameter once
                    seen.add(parameter)
                    yield owner, name, parameter


def _decays(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    # A gain [C, 1, 1] has one axis to speak of: it is no matrix.
    axes = sum(size > 1 for size in parameter.shape)
    # Rows of an embedding are looked up, not multiplied.
    return axes >= 2 and not isinstance(owner, nn.Embedding) and not any(part in name for part in _TABLE_NAMES)


def _warm_up(step: int, warmup_steps: int) -> float:
    """Linear from `1 / warmup_steps` at step 0 to 1, so that no step is wasted at a rate of zero."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant_schedule(optimizer: Optimizer, warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up, then the optimizer's rate."""
    return LambdaLR(optimizer, lambda step: _warm_up(step, warmup_steps))


def cosine_schedule(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.05
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `final_ratio` of the rate at `total_steps`, constant from there on.

    Raises ValueError as `require_an_end` does.
    """
    require_an_end(total_steps, warmup_steps)

    def factor(step: int) -> float:
        # 0 until the warm-up ends, 1 at `total_steps`.
        progress = min(1.0, max(0, step - warmup_steps) / (total_steps - warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
        return _warm_up(step, warmup_steps) * (final_ratio + (1 - final_ratio) * cosine)  # from 1 to `final_ratio`

    return LambdaLR(optimizer, factor)


def inverse_power_schedule(
    optimizer: Optimizer, inv_gamma: float = 200_000.0, power: float = 0.5, warmup_steps: int = 0
) -> LambdaLR:
    """Linear warm-up times `(1 + step / inv_gamma) ** -power`, the decay of EzAudio's autoencoder.

    >>> import torch
    >>> optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1.5e-4)
    >>> rate_at = inverse_power_schedule(optimizer, inv_gamma=3, power=0.5).lr_lambdas[0]
    >>> rate_at(0), rate_at(9)  # (1 + 9 / 3) ** -0.5
    (1.0, 0.5)
    """
    return LambdaLR(optimizer, lambda step: _warm_up(step, warmup_steps) * (1 + step / inv_gamma) ** -power)


def reapply_options(configured: Any, trainer: pl.Trainer) -> None:
    """Give the trainer's optimizers and schedules the options of freshly `configured` ones; moments and steps stay.

    Loading a state brings back the options it was saved with. With the same options nothing changes, to the bit.

    Args:
        configured: what `configure_optimizers` returns.
    """
    entries = configured if isinstance(configured, list) else [configured]
    fresh = [entry["optimizer"] if isinstance(entry, dict) else entry for entry in entries]
    for optimizer, new in zip(trainer.optimizers, fresh, strict=True):
        for group, options in zip(optimizer.param_groups, new.param_groups, strict=True):
            scheduled = "initial_lr" in options  # then the rate is the schedule's, below
            group.update({key: options[key] for key in options if key != "params" and not (scheduled and key == "lr")})
            _place_steps(optimizer, group)
    for config in trainer.lr_scheduler_configs:
        _reapply_rates(config.scheduler)


def _place_steps(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Counts of steps to where the parameters are: a fused kernel takes their addresses for those of its device.

    Optimizers that are not fused keep them on the CPU, and so do their checkpoints.
    """
    for parameter in group["params"] if group.get("fused") else ():
        state = optimizer.state.get(parameter, {})
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, torch.float32)


def _reapply_rates(scheduler: Any) -> None:
    """The rates of the schedule's present step, from the optimizer's `initial_lr`."""
    groups, before = scheduler.optimizer.param_groups, scheduler.base_lrs
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for index, (group, base) in enumerate(zip(groups, scheduler.base_lrs, strict=True)):
        if isinstance(scheduler, LambdaLR):
            group["lr"] = base * scheduler.lr_lambdas[index](scheduler.last_epoch)
        else:  # a schedule of another kind is taken to be proportional to the rate it begins with
            group["lr"] *= base / before[index]
    scheduler._last_lr = [group["lr"] for group in groups]
