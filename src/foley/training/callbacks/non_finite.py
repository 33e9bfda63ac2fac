"""Keeps one bad batch from ruining a run, and a broken run from going on."""

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from foley.core.logs import get_logger
from foley.training.base import FoleyModule
from foley.training.gradients import OnItsWay, decides_on_device, drop_unless_finite, gradient_norm, total_norm

_log = get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had gradients that were not finite."""


@dataclass
class _Batch:
    """The clips of a batch, its losses, and the norm of what gradients add up to after it."""

    ids: list[str]
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None


@dataclass
class _Step:
    """An optimizer step: its number, its batches, and whether the norm of its gradients is finite."""

    number: int
    batches: list[_Batch]
    good: OnItsWay


class NonFiniteGuard(pl.Callback):
    """Skips, counts and names the steps whose gradients are not finite, and logs the norm of the gradients.

    Where gradients are accumulated, or shared by ranks, it names the batches whose loss is not finite or that turned
    the gradients; where it cannot tell, the last batches of all ranks.

    A skipped step moves neither weights nor moments (`drop_unless_finite`), and averages stay clean. Gradients are
    equal on all ranks by then, or parts whose norm is taken over all ranks, so all ranks decide alike.
    A fused optimizer skips by itself, and so that its device need not be waited for, the guard counts and names that
    step when the next one is under way, or the run validates, saves or ends.

    The norm is measured once: the module clips with it (`FoleyModule.on_before_optimizer_step`).

    Args:
        max_consecutive: stop the run at this many skipped steps in a row.
    """

    def __init__(self, max_consecutive: int = 10) -> None:
        if max_consecutive < 1:
            raise ValueError(f"callbacks.non_finite.max_consecutive must be at least 1, got {max_consecutive}")
        self.max_consecutive = max_consecutive
        self.num_skipped = 0
        self._consecutive_ids: list[list[str]] = []
        self._batches: list[_Batch] = []  # of the step
        self._last: _Step | None = None  # which nobody has looked at
        self._stepped = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._stepped:
            self._batches, self._stepped = [], False
        self._batches.append(_Batch(list(batch.get("id", [])) if isinstance(batch, dict) else []))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._batches[-1].losses.append(loss.detach())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.accumulate_grad_batches > 1:
            self._batches[-1].norm = total_norm(list(pl_module.parameters()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._stepped = True
        self._look_back()
        norm = gradient_norm(optimizer)
        drop_unless_finite(optimizer, norm)
        self._last = _Step(trainer.global_step, self._batches, OnItsWay(norm.isfinite()))
        if decides_on_device(optimizer) or self._look_back():
            if isinstance(pl_module, FoleyModule):
                pl_module.gradient_norm = norm
            self._log_norm(trainer, pl_module, optimizer, norm)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.num_skipped:
            pl_module.log("train/skipped_steps", torch.tensor(float(self.num_skipped)))  # on the host, where it stays

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_back()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_back()

    def _log_norm(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, norm: torch.Tensor
    ) -> None:
        """`train/grad_norm`, before the module clips; of a second optimizer `train/grad_norm_1`."""
        index = trainer.optimizers.index(optimizer)
        pl_module.log("train/grad_norm" + (f"_{index}" if index else ""), norm)

    def state_dict(self) -> dict[str, Any]:
        self._look_back()
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped = state_dict["num_skipped"]

    def _look_back(self) -> bool:
        """Count the last step among the good or the bad, once, and say which it was; all ranks together."""
        step, self._last = self._last, None
        if step is None or bool(step.good.wait()):
            if step is not None:
                self._consecutive_ids.clear()
            return True
        self._count(step)
        return False

    def _count(self, skipped: _Step) -> None:
        self.num_skipped += 1
        step, batches = skipped.number, skipped.batches
        batch_ids = _of_all_ranks(_suspects(batches), batches[-1].ids if batches else [])
        self._consecutive_ids.append(batch_ids)
        _log.warning("step %d skipped: gradients are not finite; batch ids %s", step, batch_ids)
        if len(self._consecutive_ids) >= self.max_consecutive:
            raise NonFiniteLossError(
                f"gradients were not finite {self.max_consecutive} steps in a row, up to step {step}. "
                f"Batch ids, oldest first: {self._consecutive_ids}. Look at those clips, lower optimizer.lr, or set "
                "task.gradient_clip_norm; the last checkpoint is from before."
            )


def _suspects(batches: list[_Batch]) -> list[str]:
    """Clips of this rank's batches that are at fault for sure; the last batch's gradients are of all ranks."""
    before = [True, *(_is_finite(batch.norm) for batch in batches[:-1])]
    after = [*before[1:], True]
    found = [
        batch
        for batch, good, still_good in zip(batches, before, after, strict=False)
        if not all(map(_is_finite, batch.losses)) or (good and not still_good)
    ]
    return [clip for batch in found for clip in batch.ids]


def _is_finite(value: Tensor | None) -> bool:
    return value is None or bool(torch.isfinite(value))


def _of_all_ranks(suspects: list[str], last: list[str]) -> list[str]:
    """The suspects of every rank, or where no rank has one the last batch of each; all ranks must ask."""
    gathered: list[Any] = [(suspects, last)]
    if distributed.is_available() and distributed.is_initialized():
        gathered = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, (suspects, last))
    found = [item for own, _ in gathered for item in own]
    return found or [item for _, batch in gathered for item in batch]
