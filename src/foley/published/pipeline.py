"""Published pipelines of diffusers, from the hub to audio, with the accelerators of this package."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_accelerate_available
from torch import Tensor

from foley.accel.layers import declare_cacheable_layers
from foley.accel.meter import CostMeter
from foley.accel.pipelines import accelerated
from foley.checkpoint import CheckpointError
from foley.generation import Generation, GenerationRequest, GenerationSettings, Timings
from foley.hashing import hash_module
from foley.published.audio_pipelines import AudioLDM2, AudioPipeline, StableAudio
from foley.published.hub import Hub
from foley.published.pipeline_files import pipeline_folder

PUBLISHED_SOLVER = "published"
"""The `solver` of a pipeline, which keeps the scheduler it was published with."""


@dataclass(frozen=True)
class PublishedPipeline:
    """A pipeline on the hub.

    Args:
        repository: on the hub.
        family: "stable_audio" or "audioldm2"; ValueError for any other.
        dtype: of the weights.
        cacheable_layers: as `foley.accel.layers.declare_cacheable_layers` takes them; None for those of diffusers'
            own transformer blocks.
    """

    repository: str
    family: str
    dtype: str = "float32"
    cacheable_layers: Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        if self.family not in _LOADERS:
            raise ValueError(f"published.family must be one of {', '.join(_LOADERS)}, got {self.family!r}")

    def load(self, hub: Hub, cache_dir: Path) -> AudioPipeline:
        """In eval mode on the CPU; raises CheckpointError at once where a file is neither here nor to be had."""
        folder = pipeline_folder(hub, self.repository)
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "local_files_only": True}
        if not is_accelerate_available():
            options["low_cpu_mem_usage"] = False
        try:
            pipeline = _LOADERS[self.family](folder, options)
        except OSError as error:
            raise CheckpointError(f"{folder} does not hold a whole {self.repository}: {error}") from error
        if self.cacheable_layers:
            declare_cacheable_layers(pipeline.denoiser, self.cacheable_layers)
        return pipeline


# The pipelines take seconds to import, so only who loads one does.
def _load_stable_audio(folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
    from diffusers import StableAudioPipeline

    return StableAudio(StableAudioPipeline.from_pretrained(folder, **options))


def _load_audioldm2(folder: Path, options: Mapping[str, Any]) -> AudioPipeline:
    from diffusers import AudioLDM2Pipeline
    from transformers import GPT2LMHeadModel

    # The index names GPT2Model, which transformers has taken the pipeline's generation methods from.
    language_model = GPT2LMHeadModel.from_pretrained(folder / "language_model", dtype=options["dtype"])
    return AudioLDM2(AudioLDM2Pipeline.from_pretrained(folder, language_model=language_model, **options))


_LOADERS = {"stable_audio": _load_stable_audio, "audioldm2": _load_audioldm2}


def pipeline_settings(options: Mapping[str, Any]) -> GenerationSettings:
    """Of fields of `GenerationSettings`; raises ValueError for what no published pipeline can do."""
    settings = GenerationSettings(**{"solver": PUBLISHED_SOLVER, **options})
    if settings.solver != PUBLISHED_SOLVER:
        raise ValueError(f"solver={settings.solver}: a published pipeline keeps its own; leave it out")
    if settings.window_seconds is not None:
        raise ValueError("window_seconds: a published pipeline generates a clip as a whole; leave it out")
    if settings.num_steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {settings.num_steps}")
    if settings.guidance.rescale or settings.guidance.scale < 1:
        raise ValueError(
            "a published pipeline takes a guidance scale of at least 1 and no rescale, "
            f"got {settings.guidance.scale} and {settings.guidance.rescale}"
        )
    return settings


class PipelineToAudio:
    """Generates audio from captions with a pipeline of diffusers; what `TextToAudio` is to our own systems.

    Args and raises as for `TextToAudio`; the pipeline has its own longest duration too.
    """

    def __init__(
        self, audio: AudioPipeline, device: str | torch.device = "cpu", max_duration_seconds: float = 60.0
    ) -> None:
        self.audio = audio
        self.device = torch.device(device)
        self.max_duration_seconds = min(max_duration_seconds, audio.max_duration_seconds)
        audio.pipeline.to(self.device)
        self.model_hash = hash_module(audio.denoiser)

    @property
    def sample_rate_hz(self) -> int:
        """Of the generated audio."""
        return self.audio.sample_rate_hz

    def generate(
        self,
        prompts: Sequence[str],
        duration_seconds: float = 10.0,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Generation:
        """Audio for each prompt. An item depends on its prompt, seed and settings, not on the rest of its batch.

        Args:
            prompts, seeds, options: as for `TextToAudio.generate`. A seed is that of the CPU generator which the
                pipeline would be given; the solver is "published". Denoising includes the encoding of the text.

        Raises:
            ValueError: for a request that cannot be met; nothing has been computed then.
            RuntimeError: where the result is not finite.
        """
        request = GenerationRequest.of(prompts, seeds, pipeline_settings(options))
        if not 0 < duration_seconds <= self.max_duration_seconds:
            raise ValueError(
                f"duration_seconds must be above 0 and at most {self.max_duration_seconds:g}, got {duration_seconds}"
            )
        num_samples = max(1, round(duration_seconds * self.sample_rate_hz))
        timings, rows = Timings(), []
        accelerator = request.settings.accelerator
        meter = None if accelerator is None else CostMeter(accelerator)
        for start in range(0, len(request.prompts), request.settings.batch_size):
            items = slice(start, start + request.settings.batch_size)
            with timings.measured("denoise_seconds", self.device):
                latents = self._latents(request, items, duration_seconds, meter)
            with timings.measured("decode_seconds", self.device), torch.no_grad():
                rows.append(self.audio.decode(latents).float().cpu()[..., :num_samples])
        description = {
            "duration_seconds": duration_seconds,
            **request.settings.describe(),
            **({} if meter is None else meter.describe()),
            "solver": type(self.audio.pipeline.scheduler).__name__,
            "sample_rate_hz": self.sample_rate_hz,
            "model_hash": self.model_hash,
        }
        audio = torch.cat(rows)
        request.settings.check_finite(audio)
        return Generation(audio, self.sample_rate_hz, request.prompts, request.seeds, description, timings)

    def _latents(
        self, request: GenerationRequest, items: slice, duration_seconds: float, meter: CostMeter | None
    ) -> Tensor:
        settings, pipeline = request.settings, self.audio.pipeline
        scale = settings.guidance.scale
        pipeline.set_progress_bar_config(disable=settings.progress is iter, desc="denoising")
        with nullcontext() if meter is None else accelerated(self.audio.denoiser, pipeline.scheduler, scale, meter):
            return self.audio.latents(
                request.prompts[items],
                settings.negative_prompt or None,
                duration_seconds,
                num_inference_steps=settings.num_steps,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(seed) for seed in request.seeds[items]],
            )
