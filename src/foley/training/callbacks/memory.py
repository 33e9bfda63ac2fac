"""What a training step keeps in memory."""

from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from foley.training.memory import ActivationCounter


class TrainingMemory(pl.Callback):
    """Logs `memory/activation_mib`, what the first step saves for its backward pass, and on a GPU `memory/peak_mib`.

    A module with several backward passes a step is measured up to the first of them.

    Args:
        every_n_steps: how often the peak is logged.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._measuring = ExitStack()
        self._counter: ActivationCounter | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counter = ActivationCounter(pl_module.parameters())

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
        # Seldom: to log a number copies it to the device, and waits.
        if pl_module.device.type == "cuda" and batch_idx % self.every_n_steps == 0:
            pl_module.log("memory/peak_mib", torch.cuda.max_memory_allocated(pl_module.device) / 2**20)
