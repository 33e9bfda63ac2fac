"""Trains a denoiser on cached latents: masked pre-training, text alignment and fine-tuning in one module.

`LatentTraining` is what all training on latents shares, distillation too; `DiffusionTraining` is EzAudio's objective
(Hai et al. 2024, sections II-A and II-C). With a mask m of hidden frames, true where the latent must be generated, and
the prediction's target y (v by default, see `foley.diffusion.process`):

    loss = sum_l m_l |denoiser(z_t, t, c, (1 - m) z, m)_l - y_l|^2 / sum_l m_l, averaged over the batch

Stages differ in options alone: without text and with masks (pre-training), with both (alignment), with text and
everything hidden (fine-tuning).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foley.core.devices import to_device
from foley.core.seeding import torch_generator
from foley.data.datamodule import LatentDataModule
from foley.data.dataset import LatentBatch
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.models.text import TextEmbedding
from foley.training.base import FoleyModule
from foley.training.optim import parameter_groups, scale_rates
from foley.training.sharding import ShardedStrategy

SpanMasking = Callable[[int, int, torch.Generator, Tensor | None], Tensor]
"""`(B, L, generator) -> hidden [B, L]`, true where the latent must be generated."""


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
        gradient_clip_norm: largest norm of the gradients of a step; None does not clip.
        compile: trace each network's forward pass as one graph: true, or the name of a backend of `torch.compile`.
        mask_padding: leave padded frames out of attention and loss; False treats padded silence as content.
    """

    text: Any  # a `TextConditioner`, or None

    def __init__(
        self,
        denoiser: nn.Module,
        process: DiffusionProcess,
        normaliser: LatentNormaliser,
        optimizer: Callable[..., Optimizer],
        text: nn.Module | None,
        lr_schedule: Callable[[Optimizer], Any] | None,
        seed: int,
        gradient_clip_norm: float | None = None,
        compile: bool | str = False,
        mask_padding: bool = False,
    ) -> None:
        super().__init__(gradient_clip_norm)
        self.denoiser = denoiser
        self.process = process
        self.normaliser = normaliser
        self.text = text
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.seed = seed
        self.mask_padding = mask_padding
        self._backend = "inductor" if compile is True else compile  # of torch.compile
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}  # no submodules: names of weights stay as they are
        self._unconditional: TextEmbedding | None = None
        self.sharded_components = ("denoiser",)
        if text is not None and text.trainable:
            self.sharded_components = ("denoiser", "text")
        elif text is not None:
            text.requires_grad_(False)
            self.unsaved_components = ("text",)

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Note which latents these are; TypeError for other data, ValueError for clips that would be cropped.

        Features of a clip begin where it begins, so that a crop of its latent would not go with them.
        """
        latents = require_latents(datamodule)
        self.checkpoint_metadata["codec_hash"] = latents.codec_hash
        self.checkpoint_metadata["trained_seconds"] = latents.duration_seconds
        self.checkpoint_metadata["data_hash"] = latents.content_hash
        longest = int(latents.index.clips.num_frames.max())
        if self.prompt_field == "id" and longest > latents.num_frames:
            raise ValueError(
                f"data.duration_seconds is {latents.num_frames} frames, but {latents.index.url} has clips of "
                f"{longest}: precomputed features go with whole clips; raise it, or encode with max_duration_seconds"
            )

    def prompts(self, batch: LatentBatch) -> list[str]:
        """What conditions each item of `batch`."""
        return batch["id"] if self.prompt_field == "id" else batch["caption"]

    def valid_frames(self, batch: LatentBatch) -> Tensor | None:
        """`[B, L]`, false on padding to leave out; None where there is none, for flash attention takes no mask."""
        return batch["frame_mask"] if self.mask_padding and batch["is_padded"] else None

    def condition(self, batch: LatentBatch, dropped: Tensor | None = None) -> TextEmbedding | None:
        """The text of each item of `batch`, that of the empty prompt where `dropped [B]`; None without text.

        Embeddings that the loader has read are taken as they are.
        """
        if self.text is None:
            return None
        if "context" not in batch:
            prompts = self.prompts(batch)
            if dropped is not None:
                prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
            return self.text(prompts)
        stored = TextEmbedding(batch["context"], batch["context_mask"])
        stored = stored.padded(stored.mask.shape[1] + -stored.mask.shape[1] % self.text.length_multiple)
        return stored if dropped is None else stored.replaced(dropped, self.unconditional())

    @torch.no_grad()
    def unconditional(self) -> TextEmbedding:
        """Of the empty prompt, one row; kept, for it is asked for of frozen encoders alone."""
        if self._unconditional is None:
            self._unconditional = self.text([""])
        return self._unconditional

    @property
    def prompt_field(self) -> str:
        """What of a clip is its prompt, "caption" or "id"."""
        return str(getattr(self.text, "prompt_field", "caption"))

    def network(self, module: nn.Module) -> Callable[..., Tensor]:
        """`module` as training calls it: compiled where that is asked for; what samples calls `module` itself."""
        if not self._backend:
            return module
        if module not in self._compiled:
            if getattr(module, "gradient_checkpointing", False):  # DDP cannot split such a graph by its buckets
                torch._dynamo.config.optimize_ddp = False
            self._compiled[module] = torch.compile(module, fullgraph=True, backend=self._backend)
            return partial(_after_a_first_use, module, self._compiled[module])
        return self._compiled[module]

    def generators(self, *parts: int | str) -> tuple[torch.Generator, torch.Generator]:
        """For what is drawn on the host and what on the device, both seeded by `parts`; on a CPU one and the same."""
        host = torch_generator(*parts)
        return host, host if self.device.type == "cpu" else torch_generator(*parts, device=self.device)

    def configure_model(self) -> None:
        """Shard as the parent does; raises ValueError where the denoiser is to be one graph."""
        if self._backend and isinstance(self.trainer.strategy, ShardedStrategy):
            raise ValueError(
                "compile=true is not for trainer=fsdp, which swaps weights within the graph: trainer=ddp is"
            )
        super().configure_model()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer takes."""
        return parameter_groups(self)

    def configure_optimizers(self) -> Any:
        optimizer = scale_rates(self.make_optimizer(self.parameter_groups()))
        if self.make_lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_schedule(optimizer), "interval": "step"},
        }


def _after_a_first_use(module: nn.Module, compiled: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What `compiled` gives, once `module` has run as it is.

    What a module makes at its first use, as the rotary table, would be traced with it, and all be compiled again
    without it at the second.
    """
    with torch.no_grad():
        module(*args, **kwargs)
    torch.clear_autocast_cache()  # what that has cast knows no gradients
    return compiled(*args, **kwargs)


class DiffusionTraining(LatentTraining):
    """Masked denoising with an optional text condition (EzAudio, section II; methods 1).

    Everything random is drawn from (purpose, seed, step, batch, rank): a resumed run repeats itself. In training noise
    and timesteps are drawn on the device, so that nobody waits for them: each kind of device has its own.

    Args:
        denoiser, process, normaliser, optimizer, lr_schedule, seed, gradient_clip_norm, compile, mask_padding: as for
            `LatentTraining`.
        text: as there; None for a denoiser without cross-attention.
        masking: draws hidden spans; None hides everything, which makes this ordinary diffusion training.
        caption_dropout: probability of an empty caption, for classifier-free guidance.
        min_snr_gamma: weight the loss by min-SNR with this gamma; None weights all noise levels alike.
        noise_level_bins: number of bins of the validation losses by noise level.
        text_rate: of the learning rate, for a text encoder that trains along and the layers that embed what it gives.
            At the denoiser's own rate they are overwritten by what all clips of a kind have in common, before the
            denoiser hears their words, and its captions become one.
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
        gradient_clip_norm: float | None = None,
        compile: bool | str = False,
        seed: int = 0,
        text_rate: float = 1.0,
    ) -> None:
        parts = denoiser, process, normaliser, optimizer, text, lr_schedule
        super().__init__(*parts, seed, gradient_clip_norm, compile, mask_padding)
        self.masking = masking
        self.caption_dropout = caption_dropout
        self.min_snr_gamma = min_snr_gamma
        self.noise_level_bins = noise_level_bins
        self.text_rate = text_rate
        self._bin_totals = torch.zeros(2, noise_level_bins)  # errors and counts, by noise level

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Normalise by the statistics of the latents, and note which codec made them; TypeError for other data."""
        super().adopt_data(datamodule)
        self.normaliser.set(*require_latents(datamodule).latent_statistics)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `LatentTraining`; those of the text at their own rate."""
        parts = self.text, getattr(self.denoiser, "context_embedding", None)
        slowed = [part for part in parts if part is not None]
        return parameter_groups(self, slowed=slowed, rate=self.text_rate)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The loss: squared error averaged over each item's hidden frames, then over the items."""
        clean = self.normaliser.normalise(batch["latent"])  # z [B, C, L]
        size, _, frames = clean.shape
        seeds = "train", self.seed, self.trainer.global_step, batch_idx, self.global_rank
        generator, on_device = self.generators(*seeds)
        timestep = self.process.sample_timesteps(size, on_device)  # t [B]
        noise = torch.randn(clean.shape, generator=on_device, device=on_device.device)
        dropped = torch.rand(size, generator=generator) < self.caption_dropout  # they teach the negative branch
        text = self.condition(batch, dropped)
        valid = self.valid_frames(batch)
        hidden = self.masking(size, frames, generator, valid) if self.masking else None  # m [B, L]
        error = self._errors(clean, noise, timestep, text, valid, hidden)  # [B]
        if self.min_snr_gamma is not None:
            error = error * to_device(self.process.min_snr_weight(timestep, self.min_snr_gamma), error.device)
        loss = self.mean_error(error)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def mean_error(self, error: Tensor) -> Tensor:
        """Over the items `[B]` of a batch in training, however many frames of an item are hidden."""
        return error.mean()

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """Add the batch's errors, with noise and timesteps that are the same at every validation, to their bins."""
        clean = self.normaliser.normalise(batch["latent"])
        size = len(clean)
        generator = torch_generator("validation", self.seed, batch_idx, self.global_rank)
        # One draw from each of `size` equal strata: every noise level is seen, in every batch.
        level = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        timestep = self.process.timesteps_at(level)  # [B]
        noise = torch.randn(clean.shape, generator=generator)
        error = self._errors(clean, noise, timestep, self.condition(batch), self.valid_frames(batch), None)
        bins = (timestep * self.noise_level_bins // self.process.num_train_steps).long()  # [B], 0 the cleanest
        totals = self._bin_totals = self._bin_totals.to(error)
        totals.index_add_(
            1, to_device(bins, error.device), torch.stack([error, torch.ones_like(error)])
        )  # [2, bins] + [2, B]

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and the losses by noise level, bin 0 the cleanest; averaged over all ranks."""
        gathered = cast(Tensor, self.all_gather(self._bin_totals))  # [ranks, 2, bins], or [2, bins] of one
        gathered = gathered.reshape(-1, 2, self.noise_level_bins).sum(dim=0)  # [2, bins]
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
        text: TextEmbedding | None,
        valid: Tensor | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """Per item `[B]`: the mean squared error of the frames that count.

        Frames count where they are hidden and, unless that is None, `valid`.
        """
        noise, timestep = (to_device(drawn, clean.device) for drawn in (noise.to(clean.dtype), timestep))
        counted = torch.ones_like(clean[:, 0], dtype=torch.bool) if valid is None else valid  # [B, L]
        inputs: dict[str, Any] = {"context": None}
        if text is not None:
            inputs = {"context": text.embeddings, "context_mask": text.mask}
        if hidden is not None:  # the denoiser keeps from `visible` what is hidden
            hidden = to_device(hidden, clean.device)
            counted = counted & hidden
            inputs |= {"visible": clean, "hidden_mask": hidden}
        noisy = self.process.add_noise(clean, noise, timestep)  # z_t [B, C, L]
        inputs["frame_mask"] = valid
        prediction = self.network(self.denoiser)(noisy, timestep, **inputs)
        target = self.target(clean, noise, noisy, timestep, inputs)
        squared = (prediction.float() - target).square().mean(dim=1)  # [B, L]
        return (squared * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def target(self, clean: Tensor, noise: Tensor, noisy: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """`y [B, C, L]`, what the denoiser is to predict of `noisy`, with `inputs` as it is given them."""
        return self.process.target(clean, noise, timestep)
