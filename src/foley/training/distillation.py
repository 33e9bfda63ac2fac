"""Distils a student that generates in a few evaluations: guided multi-step consistency distillation.

AudioLCM (Liu et al. 2024), algorithm 1. theta is the student, theta- the target network that follows it, f the
consistency function of `foley.diffusion.consistency`, and t_{n+k}, t_n two points of its grid, k timesteps apart:

    line 4   n, omega, noise at random                         `draw`
    line 5   z_{t_{n+k}} ~ N(alpha z, sigma^2 I)               a clean latent is noised to a point of the grid
    line 6   z_{t_n}, one guided DDIM jump of the teacher      equation (13)
    line 7   d(f_theta(z_{t_{n+k}}), f_theta-(z_{t_n}))        equation (14): two points of one solution, one clean end
    line 9   theta- <- mu theta- + (1 - mu) theta              `update_target`

Scales are w throughout, 1 + omega, see `foley.diffusion.consistency`. `Teacher` is the system that a student is made
from.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foley.core.components import CheckpointError, build_component
from foley.core.config import relative_to_checkout
from foley.core.devices import to_device
from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.data.dataset import LatentBatch
from foley.data.latents import StaleCacheError
from foley.diffusion.consistency import Consistency, ddim_jump
from foley.diffusion.guidance import Conditioning, KnownLatent, bind, branches, extrapolate
from foley.models.lora import AdaptedDenoiser
from foley.models.text import TextEmbedding
from foley.system.checkpoint import fetched, published_source
from foley.system.system import System, codec_hashes, load_system
from foley.training.diffusion import LatentTraining, SpanMasking
from foley.training.sharding import ShardedStrategy

Loss = Callable[..., Tensor]
"""`(estimate [B, C, L], target [B, C, L], mask=[B, L] or None) -> []`."""


@dataclass(frozen=True)
class Teacher:
    """A trained system without its codec, and the hashes of the codecs whose latents it knows (empty: any)."""

    system: System
    codec_hashes: set[str]

    @classmethod
    def load(
        cls, path: str, text_dir: str | None = None, with_codec: bool = False, codec_path: str | None = None
    ) -> "Teacher":
        """By what `load_system` takes: a name, a directory, a checkpoint, OWNER/NAME; CheckpointError for a student.

        Args:
            text_dir: a store of its text encoder's embeddings, which then is not loaded.
            with_codec, codec_path: as `load_system` takes them.
        """
        source = published_source(path) or Path(fetched(path)).expanduser().resolve()
        system = load_system(source, with_codec, codec_path, text_dir)
        if system.consistency is not None:
            raise CheckpointError(f"system={path} is a student itself; give the system that it was distilled from")
        return cls(system, codec_hashes(source))

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """How to build all components but the codec, and the process; files in the checkout are named from there."""
        configs: Mapping[str, Mapping[str, Any]] = self.system.configs
        return {
            name: {key: relative_to_checkout(value) for key, value in configs[name].items()}
            for name in ("denoiser", "text", "normaliser", "process")
        }

    @property
    def student_configs(self) -> dict[str, dict[str, Any]]:
        """The same of a student, which is told w."""
        configs = self.configs
        return {**configs, "denoiser": {**configs["denoiser"], "guidance_embedding": True}}

    def make_student(self) -> nn.Module:
        """A denoiser with the teacher's weights and a guidance embedding that starts at zero."""
        student: nn.Module = build_component(self.student_configs["denoiser"], "teacher")
        # strict=False: the guidance embedding is the student's own.
        missing, _ = student.load_state_dict(self.system.modules["denoiser"].state_dict(), strict=False)
        if foreign := [key for key in missing if not key.startswith("guidance_embedding.")]:
            raise CheckpointError(f"the teacher's denoiser lacks weights that a student needs: {', '.join(foreign)}")
        return student

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError where latents of this codec are not what the teacher was trained on."""
        if self.codec_hashes and codec_hash not in self.codec_hashes:
            known = " or ".join(sorted(digest[:12] for digest in self.codec_hashes))
            raise StaleCacheError(
                f"the latents are of the codec {codec_hash[:12]}, the teacher was trained on those of {known}; "
                "encode them with the teacher's codec"
            )


@dataclass(frozen=True)
class Draws:
    """What chance adds to a batch: `noise [B, C, L]`, a point of the grid `[B]` and a guidance scale w `[B]` each."""

    noise: Tensor
    point: Tensor
    scale: Tensor

    def to(self, like: Tensor) -> "Draws":
        """All on the device of `like`, real numbers in its type."""
        noise, scale = self.noise.to(like.dtype), self.scale.to(like.dtype)
        return Draws(*(to_device(drawn, like.device) for drawn in (noise, self.point, scale)))


class ConsistencyDistillation(LatentTraining):
    """AudioLCM's distillation (Liu et al. 2024, algorithm 1) of a teacher with any prediction type (methods 2).

    `denoiser` is the student, with its teacher's text encoder, frozen; `target` the moving average of it. Everything
    random is drawn as in `DiffusionTraining`.

    Args:
        teacher: gives the denoiser, text encoder, normaliser and process.
        consistency: grid, range of guidance scales and boundary condition; checkpoints carry it, as a student's mark.
        optimizer, lr_schedule, seed, gradient_clip_norm, compile: as for `LatentTraining`.
        loss: distance of the two estimates, over the frames of a mask.
        target_decay: mu, what the target network keeps of itself at each step.
        masking: draws hidden spans, so that the student of a masked teacher goes on editing; None hides everything.
        lora: makes the student out of the frozen teacher and adapters (`foley.models.lora`); only these train, and the
            embedding of the guidance scale. The target network shares what is frozen. None trains all weights.
        mask_padding: leave padded frames out of attention and loss, as for a teacher that was trained so.
        half_precision_targets: evaluate teacher and target network in bfloat16, whatever the student trains in.
    """

    text: Any  # a teacher always has a text encoder

    def __init__(
        self,
        teacher: Teacher,
        consistency: Consistency,
        optimizer: Callable[..., Optimizer],
        loss: Loss,
        lr_schedule: Callable[[Optimizer], Any] | None = None,
        target_decay: float = 0.95,
        masking: SpanMasking | None = None,
        lora: Callable[[nn.Module], AdaptedDenoiser] | None = None,
        mask_padding: bool = False,
        half_precision_targets: bool = False,
        gradient_clip_norm: float | None = None,
        compile: bool | str = False,
        seed: int = 0,
    ) -> None:
        if not 0 <= target_decay < 1:
            raise ValueError(f"task.target_decay must be in [0, 1), got {target_decay}")
        system, student, configs = teacher.system, teacher.make_student(), teacher.student_configs
        if lora is not None:
            student = lora(student)
            configs["denoiser"] = student.config(configs["denoiser"])  # adapters and all
        modules: Any = system.modules
        parts = student, system.process, modules["normaliser"], optimizer, modules["text"]
        super().__init__(*parts, lr_schedule, seed, gradient_clip_norm, compile, mask_padding)
        self.source = teacher
        self.teacher = modules["denoiser"].requires_grad_(False)
        # What adapters leave frozen is one tensor in student and target: a copy that is told it has been made already.
        frozen = {id(parameter): parameter for parameter in student.parameters() if not parameter.requires_grad}
        self.target = deepcopy(student, frozen).requires_grad_(False)  # line 2
        self.text.requires_grad_(False)
        self.unsaved_components = (*self.unsaved_components, "teacher")
        self.sharded_components = ("denoiser", "target", "teacher")
        self.component_configs = configs
        self.checkpoint_metadata["teacher_hash"] = hash_module(self.teacher)
        self.consistency = consistency
        self.loss = loss
        self.target_decay = target_decay
        self.masking = masking
        self.half_precision_targets = half_precision_targets
        self.grid = consistency.grid(self.process)  # t_1 to t_N, cleanest first
        self.jump_ends = consistency.jump_ends(self.grid)  # for each point, the one before it

    def configure_model(self) -> None:
        """Shard teacher, student and target alike; ValueError where student and target share frozen tensors."""
        shared = any(not parameter.requires_grad for parameter in self.denoiser.parameters())
        if shared and isinstance(self.trainer.strategy, ShardedStrategy):
            raise ValueError(
                "task.lora with trainer=fsdp: what adapters leave frozen is one tensor in student and "
                "target network, and has one part on a process; trainer=ddp distils with adapters"
            )
        super().configure_model()

    def train(self, mode: bool = True) -> Self:
        """The student alone: what is frozen stays in eval mode."""
        super().train(mode)
        for frozen in (self.teacher, self.target, self.text):
            frozen.eval()
        return self

    def adopt_data(self, datamodule: pl.LightningDataModule) -> None:
        """Refuse latents of another codec than the teacher's (StaleCacheError); its normaliser stays as it is."""
        super().adopt_data(datamodule)
        self.source.require_codec(self.checkpoint_metadata["codec_hash"])

    def saved_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` without the unsaved components and what the target network shares with the student."""
        shared = {
            f"target.{name}" for name, parameter in self.denoiser.named_parameters() if not parameter.requires_grad
        }
        return {name: tensor for name, tensor in super().saved_state(state).items() if name not in shared}

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The distance of student and target."""
        seeds = "distil", self.seed, self.trainer.global_step, batch_idx, self.global_rank
        loss = self._batch_loss(batch, *self.generators(*seeds), self.masking)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["caption"]))
        return loss

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """The same, with draws that repeat themselves; it compares with the target of the moment, not with a truth."""
        generator = torch_generator("distil validation", self.seed, batch_idx, self.global_rank)
        loss = self._batch_loss(batch, generator, generator, None)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["caption"]), sync_dist=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The target network follows every step of the student."""
        super().optimizer_step(*args, **kwargs)
        self.update_target()

    @torch.no_grad()
    def update_target(self) -> None:
        """Line 9 of algorithm 1, with mu = `target_decay`; parameters that do not train are shared or equal."""
        pairs = zip(self.target.parameters(), self.denoiser.parameters(), strict=True)
        # theta- and theta, parameter by parameter; those that are shared are left out.
        kept, current = zip(*((target, student) for target, student in pairs if student.requires_grad), strict=True)
        torch._foreach_lerp_(kept, current, 1 - self.target_decay)  # theta- + (1 - mu) (theta - theta-)

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Draws:
        """Line 4: draws for clean latents of `shape [B, C, L]`, on the generator's device."""
        low, high = self.consistency.lowest_scale, self.consistency.highest_scale
        options: Any = {"generator": generator, "device": generator.device}
        return Draws(
            torch.randn(shape, **options),  # the noise of line 5
            torch.randint(len(self.grid), shape[:1], **options),  # n, uniform
            low + (high - low) * torch.rand(shape[:1], **options),  # w, uniform
        )

    def consistency_loss(
        self,
        clean: Tensor,
        text: Conditioning,
        draws: Draws,
        hidden: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Lines 5 to 7 of algorithm 1, the loss of equation (14).

        Args:
            clean: normalised latents `[B, C, L]`.
            text: one row per item.
            draws: see `draw`.
            hidden: `[B, L]`, true where frames count and the latent is not shown to the networks; None hides all.
            valid: `[B, L]`, false on frames that the networks do not attend to, nor the loss; None for all.
        """
        # t_{n+k} and t_n, [B] and [B].
        start, end = (to_device(times, clean.device)[draws.point] for times in (self.grid, self.jump_ends))
        known = None if hidden is None else KnownLatent(clean, hidden)
        padding = {} if valid is None else {"frame_mask": valid}
        given = {"guidance_scale": self.consistency.embedded(draws.scale), **padding}
        noisy = self.process.add_noise(clean, draws.noise, start)  # line 5
        estimate = self._estimate(self.denoiser, noisy, start, text, known, given)  # f_theta
        with torch.no_grad(), self._target_precision():
            # Two predictions [B, C, L] of the teacher; a jump is affine in them, so that they are guided first.
            negative_text = _conditioning(self.unconditional())
            both = branches(self.network(self.teacher), text, negative_text, known, more=padding)
            positive, negative = both(noisy, start)
            # In single precision from here on.
            guided = extrapolate(positive.float(), negative.float(), draws.scale[:, None, None])
            before = ddim_jump(self.process, noisy, guided, start, end)  # line 6
            target = self._estimate(self.target, before, end, text, known, given)  # f_theta-
        counted = [mask for mask in (hidden, valid) if mask is not None]
        return self.loss(estimate, target, mask=torch.stack(counted).all(dim=0) if counted else None)  # line 7

    def _estimate(
        self,
        network: nn.Module,
        noisy: Tensor,
        timestep: Tensor,
        text: Conditioning,
        known: KnownLatent | None,
        given: Mapping[str, Tensor],
    ) -> Tensor:
        """The consistency function of `network`, equation (12), `[B, C, L]`."""
        prediction = bind(self.network(network), text, known, more=given)(noisy, timestep)  # [B, C, L]
        return self.consistency.estimate(self.process, noisy, prediction.float(), timestep)  # (12)

    def _batch_loss(
        self,
        batch: LatentBatch,
        generator: torch.Generator,
        on_device: torch.Generator,
        masking: SpanMasking | None,
    ) -> Tensor:
        with torch.no_grad():
            clean = self.normaliser.normalise(batch["latent"])  # z
            text = _conditioning(self.condition(batch))
        draws = self.draw(clean.shape, on_device).to(clean)
        valid = self.valid_frames(batch)
        hidden = masking(len(clean), clean.shape[-1], generator, valid) if masking else None
        hidden = None if hidden is None else to_device(hidden, clean.device)
        return self.consistency_loss(clean, text, draws, hidden, valid)

    def _target_precision(self) -> AbstractContextManager[object]:
        if self.half_precision_targets:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def _conditioning(text: TextEmbedding | None) -> Conditioning:
    assert text is not None  # a teacher always has a text encoder
    return Conditioning(text.embeddings, text.mask)
