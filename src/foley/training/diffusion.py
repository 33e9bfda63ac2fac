"""Trains a denoiser on cached latents: masked pre-training, text alignment, fine-tuning in one module."""

from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foley.data.datamodule import LatentDataModule
from foley.data.types import LatentBatch
from foley.diffusion.process import DiffusionProcess
from foley.models.normaliser import LatentNormaliser
from foley.seeding import torch_generator
from foley.training.base import FoleyModule
from foley.training.optim import parameter_groups

SpanMasking = Callable[[int, int, torch.Generator], Tensor]
"""`(B, L, generator) -> hidden [B, L]`, true where the latent must be generated."""


class DiffusionTraining(FoleyModule):
    """Masked denoising with an optional text condition (EzAudio, section II; methods 1).

    Everything random is drawn on the CPU from (purpose, seed, step, batch, rank): a resumed run repeats itself.

    Args:
        denoiser: the network; may have no cross-attention, then `text` is None.
        process: adds noise and makes targets.
        normaliser: brings codec latents to unit variance.
        optimizer: partial that takes parameter groups.
        text: prompts to conditioning; left out of checkpoints unless `text.trainable`.
        lr_schedule: partial that takes the optimizer; None keeps its rate.
        masking: draws hidden spans; None hides everything, which makes this ordinary diffusion training.
        caption_dropout: probability of an empty caption, for classifier-free guidance.
        mask_padding: leave padded frames out of attention and loss; False treats padded silence as content.
        min_snr_gamma: weight the loss by min-SNR with this gamma; None weights all noise levels alike.
        noise_level_bins: number of bins of the validation losses by noise level.
        seed: of all random draws.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: DiffusionProcess,
        normaliser: LatentNormaliser,
        optimizer: Callable[..., Optimizer],
        text: nn.Module | None = None,
        lr_schedule: Callable[[Optimizer], Any] | None = None,
        masking: SpanMasking | None = None,
        caption_dropout: float = 0.1,
        mask_padding: bool = False,
        min_snr_gamma: float | None = None,
        noise_level_bins: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process
        self.normaliser = normaliser
        self.text = text
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.masking = masking
        self.caption_dropout = caption_dropout
        self.mask_padding = mask_padding
        self.min_snr_gamma = min_snr_gamma
        self.noise_level_bins = noise_level_bins
        self.seed = seed
        self._bin_totals = torch.zeros(2, noise_level_bins)
        if text is not None and not text.trainable:
            text.requires_grad_(False)
            self.unsaved_components = ("text",)

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Normalise by the statistics of the latents, and note which codec made them; TypeError for other data."""
        if not isinstance(datamodule, LatentDataModule):
            raise TypeError(
                f"task=diffusion needs data=latents, got {type(datamodule).__name__}; "
                "scripts/encode_latents.py makes latents of audio"
            )
        self.normaliser.set(*datamodule.latent_statistics)
        self.checkpoint_metadata["codec_hash"] = datamodule.codec_hash

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self))
        if self.make_lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_schedule(optimizer), "interval": "step"},
        }

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The loss: squared error on hidden frames, averaged over the batch's hidden frames."""
        clean = self.normaliser.normalise(batch["latent"])
        size, _, frames = clean.shape
        generator = torch_generator("train", self.seed, self.trainer.global_step, batch_idx, self.global_rank)
        timestep = self.process.sample_timesteps(size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(size, generator=generator) < self.caption_dropout
        captions = ["" if drop else text for text, drop in zip(batch["caption"], dropped.tolist(), strict=True)]
        hidden = self.masking(size, frames, generator) if self.masking else None
        error, counted = self._errors(clean, noise, timestep, captions, batch["frame_mask"], hidden)
        if self.min_snr_gamma is not None:
            error = error * self.process.min_snr_weight(timestep, self.min_snr_gamma).to(error.device)
        loss = error.sum() / counted.sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """Add the batch's errors, with noise and timesteps that are the same at every validation, to their bins."""
        clean = self.normaliser.normalise(batch["latent"])
        size = len(clean)
        generator = torch_generator("validation", self.seed, batch_idx, self.global_rank)
        # One draw from each of `size` equal strata: every noise level is seen, in every batch.
        level = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        timestep = (level * self.process.num_train_steps).long().clamp(max=self.process.num_train_steps - 1)
        noise = torch.randn(clean.shape, generator=generator)
        error, counted = self._errors(clean, noise, timestep, batch["caption"], batch["frame_mask"], None)
        bins = timestep * self.noise_level_bins // self.process.num_train_steps
        totals = self._bin_totals = self._bin_totals.to(error)
        totals.index_add_(1, bins.to(error.device), torch.stack([error, counted]))

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and the losses by noise level, bin 0 the cleanest; averaged over all ranks."""
        gathered = cast(Tensor, self.all_gather(self._bin_totals))
        gathered = gathered.reshape(-1, 2, self.noise_level_bins).sum(dim=0)
        self._bin_totals = torch.zeros_like(self._bin_totals)
        self.log("val/loss", gathered[0].sum() / gathered[1].sum().clamp(min=1), prog_bar=True, rank_zero_only=False)
        for index, (error, count) in enumerate(gathered.T):
            if count > 0:
                self.log(f"val/loss_noise_level_{index}", error / count)

    def _errors(
        self,
        clean: Tensor,
        noise: Tensor,
        timestep: Tensor,
        captions: list[str],
        frame_mask: Tensor,
        hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Per item `[B]`: the sum of the frames' mean squared errors, and the number of frames that count.

        Frames count where they are hidden and, with `mask_padding`, not padding.
        """
        noise, timestep = noise.to(clean), timestep.to(clean.device)
        valid = frame_mask if self.mask_padding else None
        counted = torch.ones_like(frame_mask) if valid is None else valid
        inputs: dict[str, Any] = {}
        if hidden is not None:
            hidden = hidden.to(clean.device)
            counted = counted & hidden
            inputs = {"visible": clean, "hidden_mask": hidden}
        noisy = self.process.add_noise(clean, noise, timestep)
        prediction = self.denoiser(noisy, timestep, frame_mask=valid, **self._context(captions), **inputs)
        squared = (prediction.float() - self.process.target(clean, noise, timestep)).square().mean(dim=1)
        return (squared * counted).sum(dim=1), counted.sum(dim=1).to(squared)

    def _context(self, captions: list[str]) -> dict[str, Tensor | None]:
        if self.text is None:
            return {"context": None}
        embedding = self.text(captions)
        return {"context": embedding.embeddings, "context_mask": embedding.mask}
