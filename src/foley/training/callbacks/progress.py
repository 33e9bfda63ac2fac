"""How far a run is: optimizer steps, their rate, and how long it goes on."""

import math
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, Timer
from rich.progress import BarColumn, Progress, TextColumn

from foley.core.logs import get_logger

_log = get_logger(__name__)

_REFRESH_SECONDS = 0.5  # metrics are copied from the device to be shown, which waits for it


class StepProgress(ProgressBar):
    """Steps done of all, steps a second, the time left and the metrics: a bar on a terminal, else lines in the log.

    Steps are the optimizer's, whatever a batch or an epoch is. The time left follows from the rate since training
    began or was resumed, validation included, and from `trainer.max_time`, whichever ends first.

    Args:
        log_every_seconds: between lines where there is no terminal.
    """

    def __init__(self, log_every_seconds: float = 30.0) -> None:
        super().__init__()
        self.log_every_seconds = log_every_seconds
        self._bar: Progress | None = None
        self._first_step = 0
        self._began = self._shown = 0.0
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (self._enabled and trainer.is_global_zero):
            return
        self._first_step, self._began, self._shown = trainer.global_step, time.monotonic(), time.monotonic()
        self._bar = Progress(BarColumn(), TextColumn("{task.description}"), transient=True)
        self._bar.disable = not self._bar.console.is_terminal
        self._bar.add_task(self.describe(), total=1.0, completed=0)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._show("validating, ")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            _log.info("%s", self.describe())
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def describe(self) -> str:
        """Such as `step 120 of 1300, 2.10 steps/s, 0:09:22 left, train/loss 0.512`."""
        steps, total = self.trainer.global_step, self.total_steps()
        seconds = time.monotonic() - self._began
        parts = [f"step {steps}" + ("" if total is None else f" of {total}")]
        if steps > self._first_step:
            parts.append(f"{(steps - self._first_step) / seconds:.2f} steps/s")
        if (left := self.seconds_left(seconds)) is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        metrics = self.trainer.progress_bar_metrics
        return ", ".join([*parts, *(f"{name} {value:.4g}" for name, value in metrics.items())])

    def total_steps(self) -> int | None:
        """The step that ends the run; None for a run that only the clock ends, or the user."""
        total = self.trainer.estimated_stepping_batches
        return int(total) if math.isfinite(total) and total >= 0 else None

    def seconds_left(self, seconds: float) -> float | None:
        """Until the last step at the rate of the past `seconds`, or the limit of time; None where neither is known."""
        steps, total = self.trainer.global_step, self.total_steps()
        limits = [] if (timer := self._timer()) is None else [timer.time_remaining()]
        if total is not None and steps > self._first_step:
            limits.append(max(0, total - steps) * seconds / (steps - self._first_step))
        return min((max(0.0, limit) for limit in limits if limit is not None), default=None)

    def share_done(self) -> float:
        """Of the steps or of the time, whichever is more."""
        total, timer = self.total_steps(), self._timer()
        shares = [self.trainer.global_step / total] if total else []
        if timer is not None and (left := timer.time_remaining()) is not None:
            elapsed = timer.time_elapsed()
            shares.append(elapsed / max(elapsed + left, 1e-9))
        return min(1.0, max(shares, default=0.0))

    def _timer(self) -> Timer | None:
        """Of `trainer.max_time`."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Timer)), None)

    def _show(self, doing: str = "") -> None:
        if self._bar is None:
            return
        now = time.monotonic()
        if now - self._shown < (self.log_every_seconds if self._bar.disable else _REFRESH_SECONDS):
            return
        self._shown = now
        self._bar.update(self._bar.task_ids[0], description=doing + self.describe(), completed=self.share_done())
        if self._bar.disable:
            _log.info("%s", doing + self.describe())

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
