"""Trains adapters of a system on a handful of sounds of one's own, so that a new word calls them.

DreamBooth (Ruiz et al. 2023): the objective is that of the system itself, on one's own clips with captions that hold a
word it does not know, and, as prior preservation, on sounds of captions that it knows (equation 2):

    loss = E |denoiser(z_t, t, c) - y|^2 + weight E |denoiser(z'_t, t', c') - y'|^2

with z' the system's own generations, or given clips. There y' is the target of z' and its noise; by default here it is
what the system predicted before it had adapters (learning without forgetting, Li and Hoiem 2016, section 3), which says
the same without the noise, and takes no bad generation for a good one.

What trains are adapters (`foley.models.lora`) instead of all weights: around the denoiser, and around a text encoder
that was trained with its system. Such an encoder spells any word in parts that it knows, since its tokenizer knows
every byte, and adapters teach it what they mean together; the vocabulary stays, so that adapters of several words
stack. A frozen encoder (T5) has met most words, and stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from foley.core.config import relative_to_checkout
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.core.numbers import COUNT, NOT_NEGATIVE
from foley.core.pipelines import system_config
from foley.core.rates import clip_size
from foley.core.seeding import torch_generator
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import AudioBatch, LatentBatch
from foley.data.ordering import evenly_spaced
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver, default_solver
from foley.models.lora import AdaptedDenoiser, adaptable, without_adapters
from foley.models.text import TextEmbedding
from foley.system.adapters import save_adapters
from foley.system.checkpoint import FOLEY_KEY
from foley.system.published import PublishedPipeline
from foley.system.published.training import pipeline_system
from foley.system.system import load_published
from foley.training.diffusion import DiffusionTraining, LatentTraining, SpanMasking
from foley.training.distillation import Teacher
from foley.training.sharding import ShardedStrategy

ADAPTER_FOLDER = "adapter"
_MET = "own_captions"  # entry of a checkpoint's description
_log = get_logger(__name__)


def load_base(path: str, codec_path: str | None = None, text_dir: str | None = None) -> Teacher:
    """The system to adapt, with its codec: one of ours (`Teacher.load`), or a pipeline of diffusers.

    Raises CheckpointError as that does, and for a pipeline that adapters are not trained of.
    """
    described = system_config(path)
    if described is not None and isinstance(instantiate(described.published), PublishedPipeline):
        return Teacher(pipeline_system(load_published(path), path), set())
    return Teacher.load(path, text_dir, True, codec_path)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What a system is to keep: sounds of captions that it knows, beside one's own in every step.

    Args:
        weight: of their error in the loss.
        follow_base: towards what the system predicts without adapters; False: towards the sounds, as in DreamBooth.
        count: of the clips that the system generates, of captions spread evenly over those that it knows.
        captions: others than those.
        clips: given ones instead, with their captions.
        num_steps, guidance_scale: of the generation.

    Raises ValueError for numbers that are none.
    """

    weight: float
    follow_base: bool
    count: int
    captions: Sequence[str] | None = None
    clips: AudioDataModule | None = None
    num_steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check("task.prior.weight", self.weight)
        COUNT.check("task.prior.count", self.count)
        COUNT.check("task.prior.num_steps", self.num_steps)


class LoraTraining(DiffusionTraining):
    """Adapters of the system `base`, on clips or on latents of them, with the system's own objective.

    Checkpoints hold the adapters alone, and so does the folder that `AdapterWriter` makes of them.

    Args:
        base: the system, with its codec.
        lora: puts adapters around the denoiser (`foley.models.lora.AdaptedDenoiser`).
        caption: of clips that have none, such as "a zorble"; None refuses them.
        adapt_text: adapt the text encoder too, where it was trained with its system.
        prior: what it is to keep; None keeps nothing.
        caption_dropout: 0 leaves the empty caption, which guidance leads away from, to the system.
        optimizer, lr_schedule, masking, mask_padding, gradient_clip_norm, compile, seed: as for `DiffusionTraining`.
    """

    takes_weights = False  # `ckpt=` is the base

    def __init__(
        self,
        base: Teacher,
        lora: Callable[[nn.Module], AdaptedDenoiser],
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], Any] | None = None,
        caption: str | None = None,
        adapt_text: bool = True,
        prior: Prior | None = None,
        masking: SpanMasking | None = None,
        caption_dropout: float = 0.0,
        mask_padding: bool = False,
        gradient_clip_norm: float | None = None,
        compile: bool | str = False,
        seed: int = 0,
    ) -> None:
        system, modules = base.system, cast(dict[str, Any], base.system.modules)
        adapts_text = adapt_text and modules["text"].trainable
        self.base_hashes = {"denoiser": hash_module(adaptable(modules["denoiser"]))}
        if adapts_text:
            self.base_hashes["text"] = hash_module(modules["text"])
        adapted = lora(modules["denoiser"])
        super().__init__(
            *(adapted, system.process, modules["normaliser"], optimizer, modules["text"], lr_schedule),
            masking=masking,
            caption_dropout=caption_dropout,
            mask_padding=mask_padding,
            gradient_clip_norm=gradient_clip_norm,
            compile=compile,
            seed=seed,
        )
        self.codec: Any = modules["codec"].requires_grad_(False)
        self.normaliser.requires_grad_(False)
        self.text.requires_grad_(False)
        if adapts_text:
            adapted.lora.inject(self.text)
        self.source, self.prior, self.caption = base, prior, caption
        self.component_configs = base.configs
        self.captions: set[str] = set()  # of one's own clips, as they are met
        self._kept: tuple[Tensor, list[str]] | None = None  # latents of the prior, not normalised, and their captions
        self._num_own = 0  # of the items of the batch at hand
        self._followed_text: TextEmbedding | None = None  # of those behind them, without adapters

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """What has adapters, by component."""
        denoiser = cast(AdaptedDenoiser, self.denoiser).denoiser
        parts: dict[str, nn.Module] = {"denoiser": adaptable(denoiser), "text": self.text}
        return {name: parts[name] for name in self.base_hashes}

    def train(self, mode: bool = True) -> Self:
        """What is frozen stays in eval mode, with adapters too: there is no dropout in them."""
        super().train(mode)
        for frozen in (self.codec, self.text):
            frozen.eval()
        return self

    def configure_model(self) -> None:
        """As the parent does; raises ValueError for sharded training, which has no use for so little."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            raise ValueError("experiment=lora with trainer=fsdp: adapters are small, and trainer=ddp trains them")
        super().configure_model()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the parent does, with the captions that were met, which a resumed run may not meet again."""
        self.checkpoint_metadata[_MET] = sorted(self.captions)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the parent does; raises as it does."""
        super().on_load_checkpoint(checkpoint)
        self.captions |= set(checkpoint[FOLEY_KEY].get(_MET, ()))

    def saved_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of `state` what trains: the adapters."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Take latents of the system's codec, or audio at its rate; raises StaleCacheError or ValueError for others.

        The normaliser stays the system's. A model that is told durations is told that of the items.
        """
        for part in (cast(AdaptedDenoiser, self.denoiser).denoiser, self.text):
            if hasattr(part, "duration_seconds"):
                part.duration_seconds = cast(Any, datamodule).duration_seconds
        if not isinstance(datamodule, AudioDataModule):
            LatentTraining.adopt_data(self, datamodule)
            self.source.require_codec(self.checkpoint_metadata["codec_hash"])
            return
        if datamodule.sample_rate_hz != self.codec.sample_rate_hz:
            raise ValueError(
                f"data.sample_rate_hz={datamodule.sample_rate_hz}: this system's codec has "
                f"{self.codec.sample_rate_hz} Hz; give data.sample_rate_hz={self.codec.sample_rate_hz}"
            )
        self.checkpoint_metadata["trained_seconds"] = datamodule.duration_seconds

    def on_train_start(self) -> None:
        """Make what the system is to keep, before anything has changed."""
        super().on_train_start()
        if self.prior is not None and self._kept is None:
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            seconds = datamodule.duration_seconds
            self._kept = self._given(self.prior, seconds) if self.prior.clips else self._generated(self.prior, seconds)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one's own clips, and that of the prior by its weight."""
        seeds = "lora", self.seed, self.trainer.global_step, batch_idx, self.global_rank
        generator, _ = self.generators(*seeds)
        own = self.latents(batch, generator)
        self.captions |= set(own["caption"])
        self._num_own = len(own["latent"])
        return super().training_step(self._with_prior(own, generator), batch_idx)

    def condition(self, batch: LatentBatch, dropped: Tensor | None = None) -> TextEmbedding | None:
        """As the parent's; in training (with `dropped`) that of the prior without adapters is kept beside it."""
        text = super().condition(batch, dropped)
        self._followed_text = None
        if dropped is not None and self.prior is not None and self.prior.follow_base and self._kept is not None:
            self._followed_text = text
            if "text" in self.base_hashes:
                with torch.no_grad(), without_adapters(self.text):
                    self._followed_text = super().condition(batch, dropped)
        return text

    def target(self, clean: Tensor, noise: Tensor, noisy: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """As the parent's; of the prior's items, which lie behind one's own, what the system said without adapters."""
        target = super().target(clean, noise, noisy, timestep, inputs)
        if self._followed_text is None:
            return target
        inputs = inputs | {"context": self._followed_text.embeddings, "context_mask": self._followed_text.mask}
        rows = slice(self._num_own, None)
        kept = {name: given[rows] for name, given in inputs.items() if given is not None}
        with torch.no_grad(), without_adapters(self.denoiser):
            followed = self.denoiser(noisy[rows], timestep[rows], **kept)
        return torch.cat([target[: self._num_own], followed.to(target)])

    def mean_error(self, error: Tensor) -> Tensor:
        """Of own items, and of the prior's by its weight: `error [B]` has these behind those."""
        own, kept = error[: self._num_own], error[self._num_own :]
        if self.prior is None or not len(kept):
            return own.mean()
        self.log("train/own_loss", own.mean().detach(), batch_size=len(own))
        self.log("train/prior_loss", kept.mean().detach(), batch_size=len(kept))
        return own.mean() + self.prior.weight * kept.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """As `DiffusionTraining`, of one's own clips."""
        super().validation_step(self.latents(batch, torch_generator("validation", batch_idx)), batch_idx)

    def latents(self, batch: AudioBatch | LatentBatch, generator: torch.Generator) -> LatentBatch:
        """Audio through the codec, sampled from its posterior; latents as they are. Clips without caption get theirs.

        Raises ValueError where there is none to get.
        """
        captions = [caption or self.caption for caption in batch["caption"]]
        if None in captions or "" in captions:
            name = batch["id"][captions.index(None) if None in captions else captions.index("")]
            raise ValueError(f'clip {name!r} has no caption: give caption="a NEW WORD", by which it will be called')
        if "latent" in batch:
            return cast(LatentBatch, {**batch, "caption": captions})
        audio = cast(AudioBatch, batch)
        return self._encoded(audio, cast(list[str], captions), generator)

    @torch.no_grad()
    def _encoded(self, batch: AudioBatch, captions: list[str], generator: torch.Generator) -> LatentBatch:
        with torch.autocast(self.device.type, enabled=False):
            latent = self.codec.encode(batch["audio"].float(), generator)  # [B, C, L]
        frames = torch.arange(latent.shape[-1], device=latent.device)
        mask = frames < (batch["length_samples"][:, None] / self.codec.hop_samples).ceil()
        return LatentBatch(
            latent=latent,
            frame_mask=mask,
            is_padded=self.mask_padding,
            caption=captions,
            label=batch["label"],
            id=batch["id"],
        )

    def _with_prior(self, own: LatentBatch, generator: torch.Generator) -> LatentBatch:
        """As many items of the prior behind one's own."""
        if self._kept is None:
            return own
        latents, captions = self._kept
        chosen = torch.randint(len(captions), (len(own["latent"]),), generator=generator)
        kept = latents[chosen.to(latents.device)].to(own["latent"])
        frames, there = own["latent"].shape[-1], kept.shape[-1]
        kept = functional.pad(kept, (0, max(0, frames - there)))[..., :frames]
        joined: Any = {
            "latent": torch.cat([own["latent"], kept]),
            "frame_mask": torch.cat(
                [own["frame_mask"], (torch.arange(frames, device=kept.device) < there).expand(len(kept), -1)]
            ),
            "caption": own["caption"] + [captions[index] for index in chosen.tolist()],
        }
        as_own = {
            name: own[name] for name in ("is_padded", "label", "id")
        }  # no embeddings, which the prior has none of
        return cast(LatentBatch, {**as_own, **joined})

    @torch.no_grad()
    def _generated(self, prior: Prior, duration_seconds: float) -> tuple[Tensor, list[str]]:
        known = prior.captions or self.source.system.captions
        if not known:
            raise ValueError(
                "task.prior: this system keeps no captions that it knows; give task.prior.captions=[...], clips of "
                "your own (task.prior.clips), or task.prior=null, which keeps nothing"
            )
        captions = [known[index % len(known)] for index in evenly_spaced(max(len(known), prior.count), prior.count)]
        _log.info("prior preservation: %d clips of known captions are generated, once", len(captions))
        denoiser = cast(AdaptedDenoiser, self.denoiser)
        _, frames = clip_size(duration_seconds, self.codec.sample_rate_hz, self.codec.hop_samples)
        guidance = ClassifierFreeGuidance(prior.guidance_scale)
        solver = Solver(default_solver(self.process), prior.num_steps)
        rows = []
        self.eval()
        with without_adapters(denoiser), without_adapters(self.text):  # a resumed run has trained them already
            negative = embed(self.text, [""])
            for first in range(0, len(captions), _PRIOR_BATCH):
                positive = embed(self.text, captions[first : first + _PRIOR_BATCH])
                seeds = range(first, first + len(positive.mask))
                run = self.process, positive, negative, list(seeds), frames, guidance, solver
                rows.append(generate_latents(denoiser.denoiser, *run, device=self.device))
        self.train()
        return self.normaliser.denormalise(torch.cat(rows)), captions

    @torch.no_grad()
    def _given(self, prior: Prior, duration_seconds: float) -> tuple[Tensor, list[str]]:
        assert prior.clips is not None
        clips: Any = prior.clips.whole_clips(duration_seconds)["train"]
        rows, captions = [], []
        for index in range(min(len(clips), prior.count)):
            item = clips[index]
            audio = functional.pad(item.audio, (0, max(0, prior.clips.num_samples - item.num_samples)))
            rows.append(self.codec.encode(torch.atleast_2d(audio)[None].to(self.device)))
            captions.append(item.caption)
        return torch.cat(rows), captions


_PRIOR_BATCH = 8  # clips denoised together


class AdapterWriter(pl.Callback):
    """Writes the adapters of a run into a folder inside its own, whenever a checkpoint is saved: the averages, if any.

    Args:
        output_dir: of the run.
        source: of the base, as it was named.
    """

    def __init__(self, output_dir: str, source: str) -> None:
        self.folder = Path(output_dir) / ADAPTER_FOLDER
        self.source = relative_to_checkout(str(source))

    @rank_zero_only
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        module = cast(Any, pl_module)
        places = {
            name: next(f"{path}." for path, inner in module.named_modules() if inner is part)
            for name, part in module.adapted.items()
        }
        states = {
            name: {
                key.removeprefix(place): tensor
                for key, tensor in checkpoint["state_dict"].items()
                if key.startswith(place)
            }
            for name, place in places.items()
        }
        facts = {"source": self.source, "steps": trainer.global_step, "clips": _clips(trainer)}
        save_adapters(self.folder, module.adapted, module.base_hashes, sorted(module.captions), states, **facts)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what came of it, and how to hear it."""
        megabytes = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()) / 1e6
        prompt = next(iter(sorted(cast(Any, pl_module).captions)), "")
        _log.info(
            'adapters, %.1f MB: foley sample system=%s "adapters=[{path: %s, scale: 1}]" prompt="%s"',
            *(megabytes, self.source, self.folder, prompt),
        )


def _clips(trainer: pl.Trainer) -> int:
    datasets: Any = getattr(trainer.datamodule, "datasets", {})  # type: ignore[attr-defined]
    return len(datasets["train"]) if "train" in datasets else 0
