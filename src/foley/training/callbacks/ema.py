"""An exponential moving average of the trained weights: what validation uses and what checkpoints hold."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from foley.training.sharding import held_like, whole

CURRENT_WEIGHTS = "current_weights"


class ExponentialMovingAverage(pl.Callback):
    """Averages trainable parameters only: frozen encoders are neither copied nor touched.

    `state_dict` of a checkpoint holds the averages; the weights under training go to `current_weights`. Of sharded
    weights each process averages its part.
    The decay is `min(decay, (1 + n) / (10 + n))` after n updates, so that a short run is not all initialisation.

    Args:
        decay: weight of the past in each update.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self._average: dict[str, Tensor] = {}
        self._swapped = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        source = self._average or _trained(pl_module)
        self._average = {name: source[name].detach().clone().to(p) for name, p in _trained(pl_module).items()}

    @property
    def averages(self) -> list[Tensor]:
        """What this process holds."""
        return list(self._average.values())

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.num_updates:  # gradients are still being accumulated
            return
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current = _trained(pl_module)
        torch._foreach_lerp_(list(self._average.values()), [current[name] for name in self._average], 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._swapped:
            self._swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates = state_dict["num_updates"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average:
            state = checkpoint["state_dict"]
            checkpoint[CURRENT_WEIGHTS] = {name: state[name] for name in self._average}
            checkpoint["state_dict"] = {**state, **whole(self._average)}

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The module has been given the averages by now; give it back the weights under training."""
        if CURRENT_WEIGHTS not in checkpoint:
            return
        for name, parameter in _trained(pl_module).items():
            self._average[name] = held_like(parameter, checkpoint["state_dict"][name]).clone()
            parameter.copy_(held_like(parameter, checkpoint[CURRENT_WEIGHTS][name]))

    @torch.no_grad()
    def _swap(self, pl_module: pl.LightningModule) -> None:
        """Exchange averages and weights, in place."""
        current = _trained(pl_module)
        for name, average in self._average.items():
            held = current[name].detach().clone()
            current[name].copy_(average)
            average.copy_(held)
        self._swapped = not self._swapped


def _trained(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
