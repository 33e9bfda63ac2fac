"""Keeps one bad batch from ruining a run, and a broken run from going on."""

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from foley.core.logs import get_logger

_log = get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had gradients that were not finite."""


@dataclass
class _Batch:
    """The clips of a batch, its losses, and the norm of what gradients add up to after it."""

    ids: list[str]
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None


class NonFiniteGuard(pl.Callback):
    """Skips, counts and names the steps whose gradients are not finite, and logs the norm of those that are.

    Where gradients are accumulated, or shared by ranks, it names the batches whose loss is not finite or that turned
    the gradients; where it cannot tell, the last batches of all ranks.

    The gradients are dropped (set to None), so that the optimizer moves neither weights nor moments, and averages
    stay clean. Gradients are equal on all ranks by then, so all ranks decide alike; sharded gradients are not, so FSDP
    runs without this guard.

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
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._batches[-1].norm = torch.nn.utils.get_total_norm(gradients)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._stepped = True
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(norm)):
            self._log_norm(trainer, pl_module, optimizer, norm)
            self._consecutive_ids.clear()
            return
        optimizer.zero_grad(set_to_none=True)
        self._count(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.num_skipped:
            pl_module.log("train/skipped_steps", float(self.num_skipped))

    def _log_norm(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, norm: torch.Tensor
    ) -> None:
        """`train/grad_norm`, before Lightning clips; of a second optimizer `train/grad_norm_1`."""
        index = trainer.optimizers.index(optimizer)
        pl_module.log("train/grad_norm" + (f"_{index}" if index else ""), norm)

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped = state_dict["num_skipped"]

    def _suspects(self) -> list[str]:
        """Clips of this rank's batches that are at fault for sure; the last batch's gradients are of all ranks."""
        before = [True, *(_is_finite(batch.norm) for batch in self._batches[:-1])]
        after = [*before[1:], True]
        found = [
            batch
            for batch, good, still_good in zip(self._batches, before, after, strict=False)
            if not all(map(_is_finite, batch.losses)) or (good and not still_good)
        ]
        return [clip for batch in found for clip in batch.ids]

    def _count(self, step: int) -> None:
        self.num_skipped += 1
        batch_ids = _of_all_ranks(self._suspects(), self._batches[-1].ids if self._batches else [])
        self._consecutive_ids.append(batch_ids)
        _log.warning("step %d skipped: gradients are not finite; batch ids %s", step, batch_ids)
        if len(self._consecutive_ids) >= self.max_consecutive:
            raise NonFiniteLossError(
                f"gradients were not finite {self.max_consecutive} steps in a row, up to step {step}. "
                f"Batch ids, oldest first: {self._consecutive_ids}. Look at those clips, lower optimizer.lr, or set "
                "trainer.gradient_clip_val; the last checkpoint is from before."
            )


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
