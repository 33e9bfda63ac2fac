"""Published pipelines of diffusers, from the hub to audio, with the accelerators of this package."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from foley.accel.cost import CostMeter
from foley.accel.diffusers.pipelines import accelerated
from foley.core.hashing import hash_module
from foley.generation.settings import Generation, GenerationRequest, GenerationSettings, Timings
from foley.system.published.audio_pipelines import AudioPipeline

PUBLISHED_SOLVER = "published"
"""The `solver` of a pipeline, which keeps the scheduler it was published with."""


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
