"""What a run costs: activations counted, memory, throughput, and the CSV file that all metrics go to."""

import csv
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.callbacks import ModelSummary
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from foley.core.files import replacing
from foley.core.logs import get_logger
from foley.core.reading import reading
from foley.training.callbacks.ema import ExponentialMovingAverage
from foley.training.sharding import local

_log = get_logger(__name__)


class ActivationCounter:
    """Counts the bytes that autograd saves inside its `hooks`; memory that several tensors share counts once.

    Args:
        parameters: what is kept anyway, and so left out.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._ignored = {_storage(parameter) for parameter in parameters}
        # Storages are told apart by address, so none may be freed and its address given away while they are counted.
        self._alive: dict[int, Tensor] = {}

    @property
    def total_bytes(self) -> int:
        """Saved so far, without sharded weights, whose memory has been let go and will be gathered again."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._alive.values())

    def hooks(self) -> saved_tensors_hooks:
        """A context in which to run a forward pass."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self._ignored:
            self._alive.setdefault(key, tensor.detach())
        # A saved output that is packed as itself would keep its own graph alive.
        return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward()` saves for its backward pass, without the parameters of `module`; also on "meta"."""
    counter = ActivationCounter(module.parameters())
    with counter.hooks():
        forward()
    return counter.total_bytes


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Adopt the header of an earlier `metrics.csv`, where the parent would delete the file."""
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger with a fixed folder, keeping the rows of the run's earlier lives.

    Args:
        save_dir: the folder of `metrics.csv` and `hparams.yaml`.
        flush_logs_every_n_steps: rows between writes.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, created on first use; a dummy on other ranks than zero."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    def rewind(self, step: int) -> None:
        """Drop the rows of steps after the first `step` ones, which a run that goes on from there writes again."""
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        if not path.is_file():
            return
        with reading(path, "the metrics of a run", "remove it"), path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            names = list(rows.fieldnames or [])
            kept = [row for row in rows if int(row["step"]) < step]  # they count from 0
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(kept)


def state_bytes(trainer: pl.Trainer) -> int:
    """Bytes of weights, buffers, moments and averages that this process holds; memory that is shared counts once."""
    module = trainer.lightning_module
    states = [
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
    ]
    averages = [
        average
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, ExponentialMovingAverage)
        for average in callback.averages
    ]
    held = [
        local(value)
        for value in (*module.parameters(), *module.buffers(), *states, *averages)
        if torch.is_tensor(value)
    ]
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in held}.values())


class TrainingMemory(pl.Callback):
    """Logs what the first step saves for its backward pass, what a process holds all the time, and a GPU's peak.

    `memory/activation_mib`, `memory/state_mib` as `state_bytes` counts it, and `memory/peak_mib`. A module with several
    backward passes a step is measured up to the first of them.

    Args:
        every_n_steps: how often the peak is logged.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._measuring = ExitStack()
        self._counter: ActivationCounter | None = None
        self._state_due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counter = ActivationCounter(pl_module.parameters())
        self._state_due = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._measuring.enter_context(self._counter.hooks())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._measuring.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._measuring.close()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._measuring.close()  # a step without a backward pass
        if self._counter is not None:
            pl_module.log("memory/activation_mib", self._counter.total_bytes / 2**20)
            self._counter = None
        if self._state_due and trainer.global_step:  # there are moments
            pl_module.log("memory/state_mib", state_bytes(trainer) / 2**20)
            self._state_due = False
        # Seldom: to log a number copies it to the device, and waits.
        if pl_module.device.type == "cuda" and batch_idx % self.every_n_steps == 0:
            pl_module.log("memory/peak_mib", torch.cuda.max_memory_allocated(pl_module.device) / 2**20)


class Throughput(pl.Callback):
    """Logs `throughput/clips_per_second` and `throughput/audio_seconds_per_second`, over all ranks.

    Validation and checkpoints are left out of the time.

    Args:
        every_n_steps: batches in one measurement.
        clip_seconds: duration of every batch item.
    """

    def __init__(self, clip_seconds: float, every_n_steps: int = 10) -> None:
        self.clip_seconds = clip_seconds
        self.every_n_steps = every_n_steps
        self._restart()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        self._clips += len(batch["id"])
        if self._batches >= self.every_n_steps:
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rate = self._clips * trainer.world_size / max(time.perf_counter() - self._start, 1e-9)
        pl_module.log("throughput/clips_per_second", rate, prog_bar=True)
        pl_module.log("throughput/audio_seconds_per_second", rate * self.clip_seconds)
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._batches = self._clips = 0


class ParameterCounts(ModelSummary):
    """Names components and their parameters on the log; Lightning's table has FLOPs too, which it cannot count."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, *_: Any, **__: Any
    ) -> None:
        columns = dict(summary_data)
        parts = [
            f"{name} ({kind}) {count.strip()}"
            for name, kind, count in zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
            if count.strip() != "0"
        ]
        totals = f"{total_parameters:,}", f"{trainable_parameters:,}"
        _log.info("%s parameters, %s of them trained: %s", *totals, ", ".join(parts))
