"""Pipelines of diffusers as systems that train: what adapters of their transformers are trained around.

A family that trains (`AudioPipeline.trains`) says by which process its model was trained, makes tokens of prompts, and
calls its transformer as ours are called. Nothing but adapters is ever trained of it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foley.core.components import CheckpointError
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.models.text import TextConditioner, TextEmbedding
from foley.system.published.audio_pipelines import AudioPipeline, whole_frames
from foley.system.system import System, identity_normaliser


class TrainablePipeline(Protocol):
    """What a family that trains has beside the rest of an `AudioPipeline`."""

    pipeline: Any

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def sample_rate_hz(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def max_duration_seconds(self) -> float: ...

    @property
    def process(self) -> DiffusionProcess: ...

    def tokens(self, prompts: list[str], duration_seconds: float) -> tuple[Tensor, Tensor]:
        """Text `[B, S, D]`, and which of it is valid `[B, S]`."""
        ...

    def predict(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, duration_seconds: float
    ) -> Tensor:
        """The prediction `[B, C, L]`, of `noisy [B, C, L]` at `timestep [B]` of the process."""
        ...


class PipelineDenoiser(nn.Module):
    """A pipeline's transformer, called as a denoiser of ours.

    Attributes:
        adapts: the transformer itself, whose names the files of adapters hold.
        duration_seconds: that the model is told of.
    """

    def __init__(self, audio: TrainablePipeline) -> None:
        super().__init__()
        self.adapts = audio.denoiser
        self._audio = audio
        self.latent_channels = int(audio.pipeline.transformer.config.in_channels)
        self.duration_seconds = audio.max_duration_seconds

    def forward(
        self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, frame_mask: Tensor | None = None
    ) -> Tensor:
        """`[B, C, L]`; padded frames are silence, which these models were trained to make."""
        return self._audio.predict(noisy, timestep, context, context_mask, self.duration_seconds)


class PipelineText(TextConditioner):
    """A pipeline's own text encoder, frozen; attributes are as for `PipelineDenoiser`."""

    trainable = False

    def __init__(self, audio: TrainablePipeline) -> None:
        super().__init__()
        parts = audio.pipeline.components.items()
        self.parts = nn.ModuleDict(
            {name: part for name, part in parts if isinstance(part, nn.Module) and name not in ("transformer", "vae")}
        )
        self._audio = audio
        self.duration_seconds = audio.max_duration_seconds

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> TextEmbedding:
        return TextEmbedding(*self._audio.tokens(prompts, self.duration_seconds))


class PipelineCodec(nn.Module):
    """A pipeline's codec, which hears a mono clip in all its channels."""

    def __init__(self, audio: TrainablePipeline) -> None:
        super().__init__()
        self.vae: Any = audio.pipeline.vae
        self.sample_rate_hz, self.hop_samples = audio.sample_rate_hz, int(self.vae.hop_length)
        self._channels = audio.channels

    @torch.no_grad()
    def encode(self, audio: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, 1, T]` to a latent `[B, C, L]`: drawn with `generator`, or the mean without one."""
        heard = whole_frames(audio, self.hop_samples).expand(-1, self._channels, -1).to(self.vae.dtype)
        posterior = self.vae.encode(heard).latent_dist
        latent: Tensor = posterior.mean if generator is None else posterior.sample(generator)
        return latent.float()


def pipeline_system(audio: AudioPipeline, source: str) -> System:
    """`audio` as a system to train adapters of; raises CheckpointError for a family that does not train."""
    if not audio.trains:
        raise CheckpointError(
            f"ckpt={source}: adapters of {type(audio).__name__} are used here, but not trained; those of Stable Audio "
            "Open and TangoFlux are"
        )
    pipeline: Any = audio
    denoiser = PipelineDenoiser(pipeline)
    modules: dict[str, nn.Module] = {
        "denoiser": denoiser,
        "text": PipelineText(pipeline),
        "codec": PipelineCodec(pipeline),
        "normaliser": LatentNormaliser(denoiser.latent_channels),
    }
    named: dict[str, Any] = {name: {"pipeline": source} for name in ("denoiser", "text", "codec", "process")}
    configs = {**named, "normaliser": identity_normaliser(denoiser.latent_channels)}
    for module in modules.values():
        module.eval().requires_grad_(False)
    return System(modules, pipeline.process, configs)
