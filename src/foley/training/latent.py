"""What all training of denoisers on cached latents shares."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from foley.data.datamodule import LatentDataModule
from foley.data.types import LatentBatch
from foley.diffusion.process import DiffusionProcess
from foley.models.normaliser import LatentNormaliser
from foley.training.base import FoleyModule
from foley.training.optim import parameter_groups


def require_latents(datamodule: pl.LightningDataModule) -> LatentDataModule:
    """`datamodule` itself; raises TypeError for data that are no latents."""
    if not isinstance(datamodule, LatentDataModule):
        raise TypeError(
            f"a denoiser trains on data=latents, got {type(datamodule).__name__}; "
            "scripts/encode_latents.py makes latents of audio"
        )
    return datamodule


class LatentTraining(FoleyModule):
    """A denoiser, what it needs to train on normalised latents and their captions, and its optimizer.

    Args:
        denoiser: the network.
        process: adds noise and makes targets.
        normaliser: brings codec latents to unit variance.
        optimizer: partial that takes parameter groups.
        text: prompts to conditioning; left out of checkpoints unless `text.trainable`. Its `prompt_field` says what of
            a clip is its prompt. None: no text.
        lr_schedule: partial that takes the optimizer; None keeps its rate.
        seed: of all random draws.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: DiffusionProcess,
        normaliser: LatentNormaliser,
        optimizer: Callable[..., Optimizer],
        text: nn.Module | None,
        lr_schedule: Callable[[Optimizer], Any] | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process
        self.normaliser = normaliser
        self.text = text
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.seed = seed
        self._parameter_groups: list[dict[str, Any]] = []
        if text is not None and not text.trainable:
            text.requires_grad_(False)
            self.unsaved_components = ("text",)

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Note which codec made the latents; TypeError for other data, ValueError for clips that would be cropped.

        Features of a clip begin where it begins, so that a crop of its latent would not go with them.
        """
        latents = require_latents(datamodule)
        self.checkpoint_metadata["codec_hash"] = latents.codec_hash
        longest = max(entry.num_frames for entry in latents.index.entries)
        if self.prompt_field == "id" and longest > latents.num_frames:
            raise ValueError(
                f"data.duration_seconds is {latents.num_frames} frames, but {latents.index.directory} has clips of "
                f"{longest}: precomputed features go with whole clips; raise it, or encode with max_duration_seconds"
            )

    def prompts(self, batch: LatentBatch) -> list[str]:
        """What conditions each item of `batch`."""
        return batch["id"] if self.prompt_field == "id" else batch["caption"]

    @property
    def prompt_field(self) -> str:
        """What of a clip is its prompt, "caption" or "id"."""
        return str(getattr(self.text, "prompt_field", "caption"))

    def setup(self, stage: str) -> None:
        """Group the parameters while they have their shapes: FSDP leaves flat shards of them."""
        self._parameter_groups = parameter_groups(self)

    def on_fit_start(self) -> None:
        """Bring a frozen text encoder here, which FSDP leaves where it was."""
        if self.text is not None and not self.text.trainable:
            self.text.to(self.device)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self._parameter_groups or parameter_groups(self))
        if self.make_lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_schedule(optimizer), "interval": "step"},
        }
