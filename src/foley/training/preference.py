"""Tunes a system on pairs of sounds of which one is preferred: DPO for diffusion and flow, and CRPO.

What is minimised is an objective of `foley.diffusion.dpo` or `foley.diffusion.crpo`. Here are its four errors: the
policy, which trains, and the reference, the same system frozen, predict for winner and loser of a pair, noised by the
same noise at the same time. With adapters (`task.lora`) the reference is the policy without them, and no second copy.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foley.core.devices import to_device
from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.data.preferences import PairBatch, PreferenceDataModule
from foley.diffusion.dpo import DiffusionDPO, PairErrors
from foley.models.lora import AdaptedDenoiser, without_adapters
from foley.models.text import TextEmbedding
from foley.training.diffusion import LatentTraining
from foley.training.distillation import Teacher


class PreferenceTuning(LatentTraining):
    """A system that predicts noise, v, the clean latent or a velocity, tuned on pairs of its latents.

    `denoiser` is the policy, with the system's text encoder, frozen; `reference` the system's denoiser, or None where
    it is the policy without its adapters. Everything random is drawn as in `DiffusionTraining`.

    Args:
        base: the system: gives the denoiser, text encoder, normaliser and process, and is the reference.
        objective: makes a loss of the four errors.
        lora: adapters around the frozen system (`foley.models.lora`), which alone train; None trains all weights.
        caption_dropout: probability of an empty caption, winner's and loser's together.
        mask_padding: leave padded frames out of attention and loss, as for a system that was trained so.
        optimizer, lr_schedule, gradient_clip_norm, compile, seed: as for `LatentTraining`.
    """

    text: Any  # a system that is tuned always has a text encoder

    def __init__(
        self,
        base: Teacher,
        objective: DiffusionDPO,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], Any] | None = None,
        lora: Callable[[nn.Module], AdaptedDenoiser] | None = None,
        caption_dropout: float = 0.0,
        mask_padding: bool = False,
        gradient_clip_norm: float | None = None,
        compile: bool | str = False,
        seed: int = 0,
    ) -> None:
        system, configs = base.system, base.configs
        modules: Any = system.modules
        digest = hash_module(modules["denoiser"])
        policy: Any = deepcopy(modules["denoiser"]).requires_grad_(True) if lora is None else lora(modules["denoiser"])
        parts = policy, system.process, modules["normaliser"], optimizer, modules["text"]
        super().__init__(*parts, lr_schedule, seed, gradient_clip_norm, compile, mask_padding)
        self.reference = modules["denoiser"].requires_grad_(False) if lora is None else None
        self.text.requires_grad_(False)
        if lora is not None:
            configs["denoiser"] = policy.config(configs["denoiser"])  # adapters and all
        self.source = base
        self.objective = objective
        self.caption_dropout = caption_dropout
        self.component_configs = configs
        self.checkpoint_metadata["reference_hash"] = digest
        self.unsaved_components = (*self.unsaved_components, "reference")
        self.sharded_components = ("denoiser", "reference") if lora is None else ("denoiser",)

    def train(self, mode: bool = True) -> Self:
        """The policy alone: what is frozen stays in eval mode."""
        super().train(mode)
        self.text.eval()
        if self.reference is not None:
            self.reference.eval()
        return self

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Refuse data that are no pairs (TypeError) and latents of another codec (StaleCacheError).

        The system's normaliser stays as it is.
        """
        if not isinstance(datamodule, PreferenceDataModule):
            raise TypeError(
                f"task=preference trains on pairs, data=preferences, got {type(datamodule).__name__}; "
                "foley prefer makes them of a system's own sounds"
            )
        super().adopt_data(datamodule)
        self.source.require_codec(self.checkpoint_metadata["codec_hash"])

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The objective of a batch of pairs."""
        seeds = "prefer", self.seed, self.trainer.global_step, batch_idx, self.global_rank
        generator, on_device = self.generators(*seeds)
        dropped = torch.rand(len(batch["latent"]), generator=generator) < self.caption_dropout
        return self._measure("train", batch, self.pair_errors(batch, on_device, dropped))

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """The same of pairs of other prompts, with draws that repeat themselves."""
        generator = torch_generator("prefer validation", self.seed, batch_idx, self.global_rank)
        self._measure("val", batch, self.pair_errors(batch, generator), sync_dist=True)

    def pair_errors(self, batch: PairBatch, generator: torch.Generator, dropped: Tensor | None = None) -> PairErrors:
        """Squared errors of policy and reference at one noise and one time for winner and loser of each pair.

        Args:
            generator: of noise and time.
            dropped: `[B]`, true where the caption is left out.
        """
        with torch.no_grad():
            clean = self.normaliser.normalise(
                torch.cat([batch["latent"], batch["loser"]])
            )  # [2 B, C, L], winners first
            text = _twice(self.condition(batch, dropped))
        size = len(batch["latent"])
        timestep = self.process.sample_timesteps(size, generator).repeat(2)  # t [2 B]
        noise = torch.randn(clean[:size].shape, generator=generator, device=generator.device).repeat(2, 1, 1)
        noise, timestep = (to_device(drawn, clean.device) for drawn in (noise.to(clean.dtype), timestep))
        valid = self.valid_frames(batch)
        valid = None if valid is None else valid.repeat(2, 1)
        noisy = self.process.add_noise(clean, noise, timestep)  # x_t

        def errors(network: nn.Module) -> Tensor:
            """`[2 B]`, means over the frames that count and the channels."""
            given: Any = {"context": text.embeddings, "context_mask": text.mask, "frame_mask": valid}
            prediction = self.network(network)(noisy, timestep, **given).float()
            residual = self.objective.residual(self.process, prediction, noisy, clean, noise, timestep)
            return _mean_square(residual, valid)

        with torch.no_grad():
            reference = self._of_reference(errors)
        return PairErrors.of(errors(self.denoiser), reference)

    def _of_reference(self, errors: Callable[[nn.Module], Tensor]) -> Tensor:
        if self.reference is not None:
            return errors(self.reference)
        with without_adapters(self.denoiser):
            return errors(self.denoiser)

    def _measure(self, stage: str, batch: PairBatch, errors: PairErrors, **options: Any) -> Tensor:
        """Log the loss, the share of pairs that policy and reward rank alike, and how far both errors have moved."""
        loss = self.objective(errors)
        found = {
            "accuracy": (self.objective.logits(errors) > 0).float().mean(),
            "winner_change": errors.winner_change.mean(),
            "loser_change": errors.loser_change.mean(),
        }
        options |= {"batch_size": len(batch["caption"])}
        self.log(f"{stage}/loss", loss, prog_bar=True, **options)
        self.log_dict({f"{stage}/{name}": value.detach() for name, value in found.items()}, **options)
        return loss


def _twice(text: TextEmbedding | None) -> TextEmbedding:
    """Of winners and losers, whose prompts are the same."""
    assert text is not None  # a system that is tuned always has a text encoder
    return TextEmbedding(text.embeddings.repeat(2, 1, 1), text.mask.repeat(2, 1))


def _mean_square(residual: Tensor, valid: Tensor | None) -> Tensor:
    """Of `[B, C, L]` over channels and the frames of `valid [B, L]`, `[B]`."""
    squared = residual.square().mean(dim=1)  # [B, L]
    if valid is None:
        return squared.mean(dim=1)
    return (squared * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
