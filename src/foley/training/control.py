"""Trains a ControlNet around a frozen text-to-audio model, on the latents of its codec (`foley.models.dit.controlnet`).

How the published one was trained is not known, but for which weights train and what is hidden of the energy. The
objective here is that of the model itself (`foley.training.diffusion`), with all frames to be generated. The energy is
that of the decoded latent: of what the model is to generate, in each crop and each draw of the posterior, so that no
audio is needed beside the latents.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foley.core.components import CheckpointError, rebuild_component
from foley.core.devices import to_device
from foley.core.seeding import torch_generator
from foley.data.dataset import LatentBatch
from foley.models.dit.controlnet import ControlledTransformer, controlled_config
from foley.models.dit.model import DiffusionTransformer
from foley.training.diffusion import DiffusionTraining, LatentTraining
from foley.training.distillation import Teacher


class ControlTraining(DiffusionTraining):
    """Embedding, copied blocks and projections train; the model, its text encoder and its codec are frozen.

    `denoiser` is model and copy together, which is what checkpoints hold: a system that `control=` can be given to.

    Args:
        base: gives the denoiser, text encoder, normaliser and process. One with a ControlNet goes on training it.
        codec: made the latents.
        control_widths: of the embedding's convolutions, as published.
        control_masking: draws the spans of the curve that are hidden, as a `SpanMask`; None hides nothing.
        hidden_share: share of items of whose curve anything is hidden.
        optimizer, lr_schedule, caption_dropout, mask_padding, gradient_clip_norm, compile, seed: as for
            `DiffusionTraining`.

    Raises CheckpointError for a model that has no long skips.
    """

    def __init__(
        self,
        base: Teacher,
        codec: nn.Module,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], Any] | None = None,
        control_widths: tuple[int, ...] = (64, 128),
        control_masking: Callable[..., Tensor] | None = None,
        hidden_share: float = 0.25,
        caption_dropout: float = 0.1,
        mask_padding: bool = False,
        gradient_clip_norm: float | None = None,
        compile: bool | str = False,
        seed: int = 0,
    ) -> None:
        system, configs = base.system, base.configs
        configs["denoiser"] = controlled_config(configs["denoiser"], control_widths)
        denoiser = controlled_denoiser(system.modules["denoiser"], configs["denoiser"])
        modules: Any = system.modules
        super().__init__(
            *(denoiser, system.process, modules["normaliser"], optimizer, modules["text"], lr_schedule),
            caption_dropout=caption_dropout,
            mask_padding=mask_padding,
            gradient_clip_norm=gradient_clip_norm,
            compile=compile,
            seed=seed,
        )
        self.requires_grad_(False)
        for parameter in denoiser.control.trained():
            parameter.requires_grad_(True)
        self.codec: Any = codec.requires_grad_(False)
        self.source = base
        self.control_masking = control_masking
        self.hidden_share = hidden_share
        self.component_configs = configs
        self.unsaved_components = (*self.unsaved_components, "codec")
        self._control: dict[str, Tensor] = {}  # the curves of the batch at hand

    def train(self, mode: bool = True) -> Self:
        """What is frozen and has a mode of training, the text encoder, stays in that of evaluation."""
        super().train(mode)
        self.text.eval()
        self.codec.eval()
        return self

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Refuse latents of another codec than the model's (StaleCacheError); its normaliser stays as it is."""
        LatentTraining.adopt_data(self, datamodule)
        self.source.require_codec(self.checkpoint_metadata["codec_hash"])

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The loss, as in `DiffusionTraining`, with the curve of each item, parts of some hidden."""
        seeds = "control", self.seed, self.trainer.global_step, batch_idx, self.global_rank
        self._control = self.draw_control(batch, torch_generator(*seeds))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """As in `DiffusionTraining`, with the whole curve of each item."""
        self._control = {"control": self.curves(batch)}
        super().validation_step(batch, batch_idx)

    def network(self, module: nn.Module) -> Callable[..., Tensor]:
        """The denoiser with the curves of the batch."""
        return partial(super().network(module), **self._control)

    def draw_control(self, batch: LatentBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """The inputs of the ControlNet: curves, and of some items what is hidden of them."""
        curve = self.curves(batch)
        if self.control_masking is None:
            return {"control": curve}
        size, _, values = curve.shape
        chosen = torch.rand(size, 1, generator=generator) < self.hidden_share
        hidden = self.control_masking(size, values, generator) & chosen  # [B, S]
        return {"control": curve, "control_hidden": to_device(hidden, curve.device)}

    @torch.no_grad()
    def curves(self, batch: LatentBatch) -> Tensor:
        """The energy `[B, 1, S]` of the decoded latents; padding is silence."""
        hop = self.codec.hop_samples
        with torch.autocast(self.device.type, enabled=False):
            audio = self.codec.decode(batch["latent"].float()).mean(dim=1)  # [B, L hop], of all channels
        audio = audio * batch["frame_mask"].repeat_interleave(hop, dim=1)
        return cast(ControlledTransformer, self.denoiser).curve(audio, hop)


def controlled_denoiser(model: nn.Module, config: dict[str, Any]) -> ControlledTransformer:
    """The trained `model` with a ControlNet that copies it; one that has a ControlNet is returned as it is."""
    if isinstance(model, ControlledTransformer):
        return model
    if not isinstance(model, DiffusionTransformer):
        kind = type(model).__name__
        raise CheckpointError(f"a ControlNet copies a denoiser with long skips, as EzAudio's; this system has a {kind}")
    controlled: ControlledTransformer = rebuild_component(config, "the model to control")
    own = controlled.state_dict()
    controlled.load_state_dict({**own, **model.state_dict()})
    controlled.copy_model()
    return controlled
