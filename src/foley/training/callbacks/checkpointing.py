"""When checkpoints are saved: at steps, at the best value, on pre-emption and at the end of a slice of time."""

import os
import signal
import threading
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, cast
from weakref import proxy

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from foley.core.logs import get_logger
from foley.training.checkpoint_io import AtomicCheckpointIO, point_to, stand_for

_log = get_logger(__name__)


class TrainingInterrupted(SystemExit):
    """Ctrl-C has ended a run; the process ends with the code that shells give to it, 130."""

    def __init__(self, status: int = 130) -> None:
        super().__init__(status)


class SliceEnded(TrainingInterrupted):
    """The time of a slice is over, and the run is not: the process ends with 75, "try again", of sysexits.h."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class _MovingCheckpoint(ModelCheckpoint):
    """One whose older files are found, compared with and removed also where their folder has moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = state_dict.get("dirpath"), self.dirpath
        if before and now and before != now:
            moved = _with_prefix(state_dict, str(before), str(now))
            if Path(moved["best_model_path"]).is_file():
                state_dict = moved
        super().load_state_dict(state_dict)


def _with_prefix(value: Any, before: str, now: str) -> Any:
    """Paths below `before`, in mappings too, as they are below `now`."""
    if isinstance(value, dict):
        return {_with_prefix(key, before, now): _with_prefix(entry, before, now) for key, entry in value.items()}
    return now + value.removeprefix(before) if isinstance(value, str) and value.startswith(before) else value


class PeriodicCheckpoint(_MovingCheckpoint):
    """`step_000123.ckpt` every n steps and at the end or a termination of the run; `last.ckpt` links to the newest.

    Ctrl-C ends the run after the step it came in, with a checkpoint and TrainingInterrupted; a second one at once.
    A handler of SIGUSR2 that is there before the run begins, as submitit's, which puts the job in the queue again and
    ends it, is called after the step in which the signal came, and after a checkpoint.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimizer steps between checkpoints.
        keep_all: keep every checkpoint, not only the newest.
        slice_minutes: end the run, as Ctrl-C does, after the step in which it is so old, counted from here on; None is
            not before its end. A validation that is due then is not cut short.
    """

    def __init__(
        self, dirpath: str, every_n_train_steps: int, keep_all: bool = False, slice_minutes: float | None = None
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=-1 if keep_all else 1,
            enable_version_counter=False,
        )
        self._requeue: Any = None
        self._requeue_asked = False
        self._interrupt: Any = None  # the handler of Ctrl-C outside of training
        self._interrupt_asked = False
        self._slice_end = None if slice_minutes is None else monotonic() + 60 * slice_minutes
        self._stop_put_off = self._sigterm_put_off = False
        self.interruption: TrainingInterrupted | None = None
        """What the run ends with where Ctrl-C or the end of its slice ends it."""

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        return self._last_global_step_saved

    @property
    def file(self) -> Path:
        """The newest checkpoint."""
        return Path(self._last_checkpoint_saved)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the next epoch where the checkpoint was of an epoch's last batch.

        Lightning takes that for a restart inside the epoch and never counts the next one as started, so that a second
        restart would repeat an epoch.
        """
        super().on_train_start(trainer, pl_module)
        self._put_off_signals()
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if trainer.fit_loop.restarted_mid_epoch and epochs.processed == epochs.started:
            trainer.fit_loop.reset_restart_stage()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save as the parent does; and at the last step of all, while the loops still stand inside their epoch."""
        if trainer.fit_loop._should_accumulate():
            self._put_off_end(trainer)
            return
        self._end_if_put_off(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._save_now(trainer)
        self._requeue_if_asked(trainer)
        self._end_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stay until the end of a validation that is due."""
        super().on_validation_start(trainer, pl_module)
        self._end_after_step(trainer, False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save again where the run ends now: what validation has changed belongs to the checkpoint too."""
        super().on_validation_end(trainer, pl_module)
        if self.interruption:
            self._save_now(trainer, again=True)
            self._end_after_step(trainer, True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The weights that a finished run ends with are always on disk."""
        self._save_now(trainer)
        _io_of(trainer).wait()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._give_signals_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """SIGTERM ends a run between two steps, so what it leaves can be resumed; a second Ctrl-C within one."""
        if isinstance(exception, SIGTERMException):
            self._save_now(trainer, again=trainer.validating)  # half of a validation: the other half is made up for
        self._give_signals_back()  # Lightning tears nothing down after an exception

    def _give_signals_back(self) -> None:
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._requeue is not None:
            signal.signal(signal.SIGUSR2, self._requeue)
        self._interrupt = self._requeue = None

    def _ask_for_interrupt(self, *_: Any) -> None:
        if self._interrupt_asked:
            raise TrainingInterrupted
        self._interrupt_asked = True
        _log.warning("interrupted: the run ends after this step, with a checkpoint; Ctrl-C again ends it at once")

    def _put_off_end(self, trainer: pl.Trainer) -> None:
        """Until the step is whole: no checkpoint has the gradients that its batches have left so far."""
        self._stop_put_off |= trainer.should_stop
        self._sigterm_put_off |= trainer.received_sigterm
        trainer.should_stop = trainer._signal_connector.received_sigterm = False

    def _end_if_put_off(self, trainer: pl.Trainer) -> None:
        trainer.should_stop |= self._stop_put_off
        trainer._signal_connector.received_sigterm |= self._sigterm_put_off
        self._stop_put_off = self._sigterm_put_off = False

    def _end_if_asked(self, trainer: pl.Trainer) -> None:
        """Save and end the run, all ranks together as for a requeue.

        Saved here, inside the loops as periodic checkpoints are: where Lightning ends a run by SIGTERM, epochs are
        counted already that a resumed run would count again.
        """
        if trainer.global_step == trainer.max_steps:
            return
        over = self._slice_end is not None and monotonic() >= self._slice_end
        asked = self._interrupt_asked or over or trainer.received_sigterm
        if trainer.strategy.reduce_boolean_decision(asked, all=False):
            if trainer.strategy.reduce_boolean_decision(self._interrupt_asked, all=False):
                self.interruption = TrainingInterrupted()
            elif trainer.strategy.reduce_boolean_decision(over, all=False):
                self.interruption = SliceEnded()
            self._save_now(trainer)
            self._end_after_step(trainer, True)

    def _end_after_step(self, trainer: pl.Trainer, end: bool) -> None:
        """Let Lightning end the run, or not yet, once what the step has logged is written."""
        if self.interruption or end:
            trainer._signal_connector.received_sigterm = end

    def _put_off_signals(self) -> None:
        """Until the end of a step; signals reach the main thread alone."""
        if threading.current_thread() is threading.main_thread():
            self._interrupt = signal.signal(signal.SIGINT, self._ask_for_interrupt)
        if callable(handler := signal.getsignal(signal.SIGUSR2)):
            self._requeue = handler
            signal.signal(signal.SIGUSR2, self._ask_for_requeue)

    def _ask_for_requeue(self, *_: Any) -> None:
        self._requeue_asked = True

    def _requeue_if_asked(self, trainer: pl.Trainer) -> None:
        """All ranks together, whichever was signalled first: saving is a joint act."""
        if self._requeue is None:
            return
        if trainer.strategy.reduce_boolean_decision(self._requeue_asked, all=False):
            self._requeue_asked = False
            self._save_now(trainer)
            _io_of(trainer).wait()  # the handler ends the process
            self._requeue(signal.SIGUSR2, None)

    def _save_now(self, trainer: pl.Trainer, again: bool = False) -> None:
        """Save, unless this step is saved already and not to be saved `again`."""
        if again:
            self._last_global_step_saved = -1
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Save, then point `last.ckpt` there by a rename; the parent removes the older file only after that."""
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            _io_of(trainer).later(partial(point_to, Path(filepath).with_name("last.ckpt"), Path(filepath)))
        trainer.strategy.barrier()


def _io_of(trainer: pl.Trainer) -> AtomicCheckpointIO:
    return cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io)


class BestCheckpoint(_MovingCheckpoint):
    """`best.ckpt`: the validated weights with the lowest `monitor`.

    Where a periodic checkpoint of the same step has been saved it is that one under another name, and costs nothing.

    Args:
        dirpath: folder of the checkpoint.
        monitor: a metric that validation logs.
    """

    def __init__(self, dirpath: str, monitor: str = "val/loss") -> None:
        super().__init__(
            dirpath=dirpath, filename="best", monitor=monitor, save_top_k=1, mode="min", enable_version_counter=False
        )

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        saved = next((one for one in trainer.checkpoint_callbacks if isinstance(one, PeriodicCheckpoint)), None)
        if saved is None or saved.step != trainer.global_step:
            super()._save_checkpoint(trainer, filepath)
            return
        if trainer.is_global_zero:
            _io_of(trainer).later(partial(stand_for, Path(filepath), saved.file))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))  # as the parent tells them
        trainer.strategy.barrier()
