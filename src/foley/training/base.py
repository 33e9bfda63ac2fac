"""The LightningModule that every trainer of this package builds on: checkpoints that describe themselves."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from foley.core.components import CheckpointError, compare_states, current_config, written_out
from foley.system.checkpoint import FOLEY_KEY
from foley.training.gradients import clip_gradients
from foley.training.optim import reapply_options
from foley.training.settings import FILES_KEY, NEUTRAL
from foley.training.sharding import ShardedStrategy

ACCUMULATED_KEY = "accumulated_batches"
"""Entry of a training checkpoint: how many batches made a step, by which its loops have counted."""

LATER_KEYS = ("data_hash", FILES_KEY)
"""Entries of a description that checkpoints of version 0.1 lack."""


class FoleyModule(pl.LightningModule):
    """A LightningModule whose checkpoints say, in plain data, how to rebuild the components whose weights they hold.

    Attributes:
        component_configs: component name (the prefix of its parameters) to a plain dict with `_target_`;
            `foley.training.run.train` adds those of the task's config once the module is built.
        checkpoint_metadata: further plain entries of `checkpoint["foley"]`, such as `codec_hash`.
        unsaved_components: prefixes that checkpoints leave out, such as a frozen text encoder.
        gradient_clip_norm: largest norm of the gradients of a step; None does not clip.
        sharded_components: what processes hold parts of under trainer=fsdp; all that trains is among them.
        gradient_norm: of this step, before clipping, where a callback has measured it.
        takes_weights: whether `ckpt=` gives weights to begin with; False where the module is built around it.
    """

    gradient_norm: Tensor | None = None
    takes_weights = True

    def __init__(self, gradient_clip_norm: float | None = None) -> None:
        super().__init__()
        self.gradient_clip_norm = gradient_clip_norm
        self.component_configs: dict[str, dict[str, Any]] = {}
        self.checkpoint_metadata: dict[str, Any] = {}
        self.unsaved_components: tuple[str, ...] = ()
        self.sharded_components: tuple[str, ...] = ()

    @property
    def strict_loading(self) -> bool:
        """False for Lightning, because `on_load_checkpoint` has compared all keys but the unsaved components'."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        raise AttributeError("loading is always strict, apart from `unsaved_components`; see on_load_checkpoint")

    def saved_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` without the entries of `unsaved_components`."""
        prefixes = tuple(f"{name}." for name in self.unsaved_components)
        return {key: value for key, value in state.items() if not key.startswith(prefixes)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write `checkpoint["foley"]` and drop the weights that are found elsewhere."""
        checkpoint[FOLEY_KEY] = self.description()
        if self._trainer is not None:
            checkpoint[ACCUMULATED_KEY] = self.trainer.accumulate_grad_batches
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = self.saved_state(checkpoint["state_dict"])

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Take over what the data knows (such as latent statistics) before training; nothing by default."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that disagrees with this module; raises CheckpointError with every key concerned."""
        saved, own = current_config(checkpoint.get(FOLEY_KEY, {})), self.description()
        for key in set(LATER_KEYS) - set(saved):  # older checkpoints do not say
            own.pop(key, None)
        complaints = _differences(_comparable(saved), _comparable(own))
        complaints += compare_states(checkpoint["state_dict"], self.saved_state(self.state_dict())).complaints
        if complaints:
            raise CheckpointError(
                f"the checkpoint does not fit {type(self).__name__}:\n  "
                + "\n  ".join(complaints)
                + "\nResume with the config the run began with, or start a new run from its weights with `ckpt=`."
            )
        if self._trainer is not None:
            _count_batches_anew(checkpoint, self.trainer.accumulate_grad_batches)

    def configure_model(self) -> None:
        """Shard `sharded_components` where the trainer does so; raises ValueError where there are none."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            if not self.sharded_components:
                raise ValueError(
                    f"trainer=fsdp shards denoisers, and {type(self).__name__} has none: trainer=ddp trains it"
                )
            for name in self.sharded_components:
                self.trainer.strategy.shard(self.get_submodule(name))

    def on_train_start(self) -> None:
        """Go on with the rates, decays and schedules of this run, where loading has brought the checkpoint's back."""
        if self.trainer.ckpt_path is not None:
            reapply_options(self.configure_optimizers(), self.trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients, which callbacks have seen by now as they were.

        Lightning's own clipping refuses fused optimizers, and measures the norm once more.
        """
        norm, self.gradient_norm = self.gradient_norm, None
        clip_gradients(optimizer, self.gradient_clip_norm, norm)

    def description(self) -> dict[str, Any]:
        """What `checkpoint["foley"]` says: how to build the components, and the entries of `checkpoint_metadata`."""
        return {"components": self.component_configs, **self.checkpoint_metadata}


def _count_batches_anew(checkpoint: Mapping[str, Any], accumulated: int) -> None:
    """Let the loops of `checkpoint` have counted batches as where `accumulated` of them make a step."""
    before = checkpoint.get(ACCUMULATED_KEY, accumulated)
    if before == accumulated:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        more = counts["ready"] * accumulated // before - counts["ready"]
        counts.update({name: count + more for name, count in counts.items()})  # one may be behind, and stays so


def _comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that resuming must not change, options left to their defaults among them; paths may."""
    keys = ("components", "codec_hash", "teacher_hash", "reference_hash", "data_hash", FILES_KEY)
    return {key: written_out(description[key]) for key in keys if key in description}


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{path}.{key}" if path else str(key))
    return flat


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """One line per config key whose value is not the same on both sides."""
    absent = "(absent)"
    left, right = _flatten(saved), _flatten(own)
    return [
        f"config {key}: {left.get(key, absent)} in the checkpoint, {right.get(key, absent)} in the run"
        for key in sorted(set(left) | set(right))
        if left.get(key, absent) != right.get(key, absent) and key.rpartition(".")[-1] not in NEUTRAL
    ]
