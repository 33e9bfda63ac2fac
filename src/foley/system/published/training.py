"""Pipelines of diffusers as systems that train: what adapters of their transformers are trained around.

A family that trains (`AudioPipeline.trains`) says by which process its model was trained, makes tokens of prompts, and
calls its transformer as ours are called. Nothing but adapters is ever trained of it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foley.core.components import CheckpointError
from foley.core.logs import get_logger
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.models.text import TextConditioner, TextEmbedding
from foley.system.published.audio_pipelines import AudioPipeline, whole_frames
from foley.system.system import System, identity_normaliser

_log = get_logger(__name__)


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

    @property
    def hop_samples(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def encode(self, audio: Tensor, generator: torch.Generator | None) -> Tensor:
        """A latent `[B, C, L]` of `[B, channels, T]`: drawn with `generator`, or the mean without one."""
        ...

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
        self.latent_channels = audio.latent_channels
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
    """A pipeline's codec, which hears a mono clip in all its channels, and one of as many as it is."""

    def __init__(self, audio: TrainablePipeline) -> None:
        super().__init__()
        self.vae: Any = audio.pipeline.vae
        self.sample_rate_hz, self.hop_samples = audio.sample_rate_hz, audio.hop_samples
        self._audio = audio

    @torch.no_grad()
    def encode(self, audio: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, 1 or channels, T]` to a latent `[B, C, L]`: drawn with `generator`, or the mean without one."""
        heard = whole_frames(audio, self.hop_samples).expand(-1, self._audio.channels, -1).to(self.vae.dtype)
        return self._audio.encode(heard, generator).float()


def pipeline_system(audio: AudioPipeline, source: str) -> System:
    """`audio` as a system to train adapters of; raises CheckpointError for a family that does not train."""
    if not audio.trains:
        raise CheckpointError(
            f"ckpt={source}: adapters of {type(audio).__name__}, a U-Net, are used here, but not trained; those of the "
            "transformers are: Stable Audio Open and 3, TangoFlux, ACE-Step and LongCat"
        )
    if audio.is_distilled:
        _log.warning(
            "%s is distilled to few steps, which this training does not keep: train on its base model, and take the "
            "adapter here with any_base: true",
            source,
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
