"""Published pipelines of diffusers, from the hub to audio, with the accelerators of this package.

Also `open_generator`, which opens whatever generates audio by the name of its system.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foley.accel.cost import CostMeter
from foley.accel.diffusers.pipelines import accelerated
from foley.accel.precision import choose_precision, computing_in
from foley.accel.quantisation import quantise_pipeline
from foley.core.config import published_name
from foley.core.devices import machine_name, resolve_device
from foley.core.hashing import hash_module
from foley.core.locks import sole_user
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import CosineProcess
from foley.diffusion.solver import Solver
from foley.generation.calibrating import calibrate_missing, calibration_prompts
from foley.generation.prompts import Clip, as_clips
from foley.generation.result import Generation, Timings
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.published.audio_pipelines import AudioPipeline, StableAudio
from foley.system.system import System, load_published, load_system

PUBLISHED_SOLVER = "published"
"""The `solver` of a pipeline that keeps the scheduler it was published with, as all do by default."""
_DEFAULT_STEPS = 50
_DEFAULT_SECONDS = 10.0  # the papers' clips


def chosen_solver(settings: GenerationSettings) -> Solver | None:
    """The solver of ours that was asked for; None is the pipeline's own. Raises ValueError as `Solver` does."""
    if settings.solver not in (None, PUBLISHED_SOLVER):
        return Solver(settings.solver, settings.num_steps or _DEFAULT_STEPS, eta=settings.eta)
    if settings.eta:
        raise ValueError(f"eta={settings.eta:g}: the published solver of a pipeline has none; give solver=ddim too")
    return None


def check_pipeline_settings(settings: GenerationSettings, takes_solvers: bool) -> None:
    """Raises ValueError for what no published pipeline can do, or none but those that take our solvers."""
    guidance = settings.guidance or ClassifierFreeGuidance()
    if settings.source is not None:
        raise ValueError("edit, init and control need a system of ours: the pipelines of diffusers only generate")
    solver = chosen_solver(settings)
    if solver is not None and not takes_solvers:
        raise ValueError(
            f"solver={solver.name}: a published pipeline keeps its own, but for Stable Audio's; leave it out, or give "
            f"solver={PUBLISHED_SOLVER}"
        )
    if settings.window_seconds is not None:
        raise ValueError("window_seconds: a published pipeline generates a clip as a whole; leave it out")
    if settings.num_steps is not None and settings.num_steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {settings.num_steps}")
    if solver is not None:
        solver.build(CosineProcess())  # whether it fits is known before anything is loaded
    elif guidance.rescale or guidance.scale < 1:
        raise ValueError(
            "a published pipeline takes a guidance scale of at least 1 and no rescale, "
            f"got {guidance.scale} and {guidance.rescale}; of Stable Audio a solver of ours takes both, as solver=heun"
        )


class PipelineToAudio:
    """Generates audio from captions with a pipeline of diffusers; what `TextToAudio` is to our own systems.

    Args and raises as for `TextToAudio`; the pipeline has its own longest duration too.
    """

    def __init__(
        self, audio: AudioPipeline, device: str | torch.device = "cpu", max_duration_seconds: float = 60.0
    ) -> None:
        self.audio = audio
        self.device = resolve_device(device)
        self.max_duration_seconds = min(max_duration_seconds, audio.max_duration_seconds)
        audio.pipeline.to(self.device)
        self.quantised: str | None = None
        self.optimise()
        self.model_hash = hash_module(audio.denoiser)

    def optimise(self, precision: str = "auto", quantised: str | None = None) -> None:
        """Denoise under autocast to a precision, "auto" as for `TextToAudio`; latents and weights stay as they are.

        A pipeline whose weights are in half precision computes in that. `quantised`, one of
        `foley.accel.quantisation.KINDS`, holds linear layers of denoiser and text encoders in 8 bits. Raises ValueError
        for an unknown precision or kind, for a kind that the device lacks, and for another one than before.
        """
        self.precision = choose_precision(precision, self.device)
        if quantised != self.quantised:
            if self.quantised is not None:
                raise ValueError(
                    f"quantise={quantised}: the weights are rounded to {self.quantised} by now; load again"
                )
            quantise_pipeline(self.audio.pipeline, self.audio.denoiser, quantised)
            self.quantised = quantised

    @property
    def sample_rate_hz(self) -> int:
        """Of the generated audio."""
        return self.audio.sample_rate_hz

    def generate(
        self,
        prompts: Sequence[str | Clip],
        duration_seconds: float | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Generation:
        """Audio for each prompt. An item depends on its prompt, seed and settings, not on the rest of its batch.

        Args:
            prompts, seeds, options: as for `TextToAudio.generate`. A seed is that of the CPU generator which the
                pipeline would be given. The solver is "published", or, of Stable Audio, any of `SOLVERS` but those of
                flows. Denoising includes the encoding of the text.

        Raises:
            ValueError: for a request that cannot be met; nothing has been computed then.
            RuntimeError: where the result is not finite.
        """
        settings = GenerationSettings(duration_seconds=duration_seconds, **options)
        settings.warn_without_effect()
        return self.generate_clips(as_clips(prompts, seeds), settings)

    def generate_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> Generation:
        """Every clip in the same way; raises as `generate` does. Threads that share a pipeline take turns."""
        with sole_user(self.audio.denoiser), computing_in(self.precision, self.device):
            return self._generate_clips(clips, settings)

    def denoise_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> None:
        """Denoise every clip and decode none, for an accelerator that only looks on; raises as `generate_clips`."""
        with sole_user(self.audio.denoiser):
            seconds, guidance, num_steps = self._choose(settings)
            meter = None if settings.accelerator is None else CostMeter(settings.accelerator)
            for first in range(0, len(clips), settings.batch_size):
                batch = clips[first : first + settings.batch_size]
                self._latents(batch, seconds, settings, guidance, num_steps, meter)

    def _choose(self, settings: GenerationSettings) -> tuple[float, ClassifierFreeGuidance, int]:
        """Duration, guidance and steps; raises ValueError for what the pipeline cannot do."""
        check_pipeline_settings(settings, isinstance(self.audio, StableAudio))
        seconds = settings.duration_seconds or min(_DEFAULT_SECONDS, self.max_duration_seconds)
        if seconds > self.max_duration_seconds:
            raise ValueError(f"duration_seconds must be at most {self.max_duration_seconds:g}, got {seconds}")
        return seconds, settings.guidance or ClassifierFreeGuidance(), settings.num_steps or _DEFAULT_STEPS

    def _generate_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> Generation:
        seconds, guidance, num_steps = self._choose(settings)
        num_samples = max(1, round(seconds * self.sample_rate_hz))
        solver = chosen_solver(settings)
        name = type(self.audio.pipeline.scheduler).__name__ if solver is None else solver.name
        run = (self.model_hash, name if solver is None else solver.label, num_steps, guidance.scale)
        uncached = GenerationSettings(
            guidance=guidance, batch_size=settings.batch_size, solver=settings.solver, eta=settings.eta
        )
        calibrate_missing(settings.accelerator, run, calibration_prompts(()), uncached, self.denoise_clips)
        meter = None if settings.accelerator is None else CostMeter(settings.accelerator)
        timings, rows = Timings(), []
        for first in range(0, len(clips), settings.batch_size):
            batch = clips[first : first + settings.batch_size]
            with timings.measured("denoise_seconds", self.device):
                latents = self._latents(batch, seconds, settings, guidance, num_steps, meter)
            with timings.measured("decode_seconds", self.device), torch.no_grad():
                rows.append(self.audio.decode(latents).float().cpu()[..., :num_samples])  # [B, channels, T]
        description = {
            "duration_seconds": seconds,
            **settings.describe(guidance, name, num_steps),
            **({} if meter is None else meter.describe()),
            "sample_rate_hz": self.sample_rate_hz,
            "precision": self.precision,
            **({} if self.quantised is None else {"quantise": self.quantised}),
            "model_hash": self.model_hash,
            **settings.facts,
        }
        made = clips, torch.cat(rows), self.sample_rate_hz, description, timings
        return Generation(*made, machine=machine_name(self.device), batch_size=settings.batch_size)

    def _latents(
        self,
        clips: Sequence[Clip],
        duration_seconds: float,
        settings: GenerationSettings,
        guidance: ClassifierFreeGuidance,
        num_steps: int,
        meter: CostMeter | None,
    ) -> Tensor:
        request = [clip.prompt for clip in clips], settings.negative_prompt or None, duration_seconds
        seeds, solver = [clip.seed for clip in clips], chosen_solver(settings)
        half = computing_in(self.precision, self.device, autocast=True)
        if solver is not None and isinstance(self.audio, StableAudio):
            with half:
                return self.audio.solve(*request, seeds, solver, guidance, meter, settings.progress)
        pipeline, scale = self.audio.pipeline, guidance.scale
        pipeline.set_progress_bar_config(disable=settings.progress is iter, desc="denoising")
        with (
            half,
            nullcontext() if meter is None else accelerated(self.audio.denoiser, pipeline.scheduler, scale, meter),
        ):
            return self.audio.latents(
                *request,
                num_inference_steps=num_steps,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            )


def open_generator(
    system: str | Path,
    device: str | torch.device = "cpu",
    max_duration_seconds: float = 60.0,
    hub_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    codec_path: str | Path | None = None,
) -> TextToAudio | PipelineToAudio:
    """Whatever `system` names, ready to generate: a published system or pipeline, a folder, or a checkpoint.

    Args:
        codec_path: as for `load_system`.
        hub_dir, cache_dir, overrides: of a published one, as for `load_published`.

    Raises CheckpointError where something cannot be had.
    """
    name = published_name(system)
    if name is None or codec_path is not None:
        loaded = load_system(system, codec_path=codec_path)
    else:
        loaded = load_published(name, hub_dir, cache_dir, overrides)
    if isinstance(loaded, System):
        return TextToAudio(loaded, device, max_duration_seconds)
    return PipelineToAudio(loaded, device, max_duration_seconds)
