"""How fast a run goes: clips and seconds of audio for each second of wall-clock time."""

import time
from typing import Any

import pytorch_lightning as pl


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
