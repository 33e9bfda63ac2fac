"""Published pipelines of diffusers, from the hub to audio, with the accelerators of this package.

Also `open_generator`, which opens whatever generates audio by the name of its system.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foley.accel.cost import CostMeter
from foley.accel.diffusers.pipelines import accelerated
from foley.accel.precision import choose_precision, computing_in
from foley.accel.quantisation import quantise_pipeline
from foley.core.devices import machine_name, resolve_device
from foley.core.hashing import hash_module
from foley.core.locks import sole_user
from foley.core.pipelines import system_config
from foley.data.audio import PEAK_CEILING
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import CosineProcess
from foley.diffusion.solver import Solver
from foley.generation.calibrating import calibrate_missing, calibration_prompts
from foley.generation.canvas import crop
from foley.generation.editing import Edit, EditMask, EditMasks, Recording, Variation, paste_fitted
from foley.generation.prompts import Clip, as_clips
from foley.generation.result import Generation, Timings
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.adapters import Adapters, AdapterStack, adapter_choices
from foley.system.checkpoint import fetched
from foley.system.published.audio_pipelines import AudioPipeline
from foley.system.published.stable_audio import StableAudio
from foley.system.system import System, load_published, load_system

PUBLISHED_SOLVER = "published"
"""The `solver` of a pipeline that keeps the scheduler it was published with, as all do by default."""
DEFAULT_STEPS = 50
_DEFAULT_SECONDS = 10.0  # the papers' clips


def chosen_solver(settings: GenerationSettings) -> Solver | None:
    """The solver of ours that was asked for; None is the pipeline's own. Raises ValueError as `Solver` does."""
    if settings.solver not in (None, PUBLISHED_SOLVER):
        return Solver(settings.solver, settings.num_steps or DEFAULT_STEPS, eta=settings.eta)
    if settings.eta:
        raise ValueError(f"eta={settings.eta:g}: the published solver of a pipeline has none; give solver=ddim too")
    return None


def check_pipeline_settings(settings: GenerationSettings, family: type[AudioPipeline]) -> None:
    """Raises ValueError for what no pipeline of the family can do."""
    guidance = settings.guidance or ClassifierFreeGuidance()
    _check_source(settings, family)
    solver = chosen_solver(settings)
    if solver is not None and not family.takes_solvers:
        raise ValueError(
            f"solver={solver.name}: a published pipeline keeps its own, but for Stable Audio's; leave it out, or give "
            f"solver={PUBLISHED_SOLVER}"
        )
    if settings.window_seconds is not None:
        raise ValueError("window_seconds: a published pipeline generates a clip as a whole; leave it out")
    if settings.num_steps is not None and settings.num_steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {settings.num_steps}")
    if settings.negative_prompt and not family.takes_negative_prompt:
        raise ValueError(
            f"negative_prompt={settings.negative_prompt!r}: {family.__name__} guides away from an embedding that it "
            "has learned; leave it out"
        )
    settings.refuse_lyrics(family.takes_lyrics)
    if solver is not None:
        solver.build(CosineProcess())  # whether it fits is known before anything is loaded
    elif not guidance.is_constant:
        raise ValueError(
            f"guidance: a published pipeline guides by itself, and knows no {type(guidance).__name__}; of Stable Audio "
            "a solver of ours does, as solver=heun"
        )
    elif guidance.rescale or guidance.scale < 1:
        raise ValueError(
            "a published pipeline takes a guidance scale of at least 1 and no rescale, "
            f"got {guidance.scale} and {guidance.rescale}; of Stable Audio a solver of ours takes both, as solver=heun"
        )


def _check_source(settings: GenerationSettings, family: type[AudioPipeline]) -> None:
    source = settings.source
    can = {Edit: family.edits, Variation: family.varies}.get(type(source), False)
    if source is not None and not can:
        raise ValueError(
            "edit, init and control need a system of ours: the pipelines of diffusers only generate, but for Stable "
            "Audio 3 and ACE-Step, which edit and vary"
        )
    if isinstance(source, Edit) and isinstance(source.mask, EditMasks):
        raise ValueError(
            "masks: a pipeline replaces one part of a recording at a time; give mask_start_seconds and "
            "mask_length_seconds, and edit the result again"
        )
    if isinstance(source, Variation) and source.strength == 0:
        raise ValueError("strength=0: a pipeline varies a recording by some of its noise at least; give more than 0")


@dataclass(frozen=True)
class _Plan:
    """What a request comes to: `make` gives latents of prompts, and `finish` the audio of what is decoded of them.

    `finish` takes `[B, channels, T or more]` and gives `[B, channels, T]` and gains `[B]`, as those of a `Canvas`.
    """

    make: Callable[..., Tensor]
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]
    description: Mapping[str, Any]
    guidance: ClassifierFreeGuidance
    num_steps: int
    duration_seconds: float
    peak_ceiling: float = PEAK_CEILING


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
        self._adapters = AdapterStack({"denoiser": audio.denoiser})
        self.optimise()
        self.model_hash = hash_module(audio.denoiser)

    def optimise(self, precision: str = "auto", quantised: str | None = None) -> None:
        """Denoise under autocast to a precision, "auto" as for `TextToAudio`; latents and weights stay as they are.

        A pipeline whose weights are in half precision computes in that. `quantised`, one of
        `foley.accel.quantisation.KINDS`, holds linear layers of denoiser and text encoders in 8 bits. Raises ValueError
        for an unknown precision or kind, for a kind that the device lacks, and for another one than before.
        """
        self.precision = choose_precision(precision, self.device)
        if quantised == self.quantised:
            return
        if quantised is None or self.quantised is not None:
            raise ValueError(f"quantise={quantised}: the weights are rounded to {self.quantised} by now; load again")
        quantise_pipeline(self.audio.pipeline, self.audio.denoiser, quantised)
        self.quantised = quantised

    def use_adapters(self, adapters: Adapters) -> None:
        """As that of `TextToAudio`, on the pipeline's denoiser."""
        if not (choices := adapter_choices(adapters)) and not self._adapters.describe():
            return
        if self.quantised is not None:
            raise ValueError(f"adapters: the weights are rounded to {self.quantised} by now; load the pipeline again")
        with sole_user(self.audio.denoiser):
            try:
                self._adapters.use(choices)
            finally:
                self.model_hash = hash_module(self.audio.denoiser)

    @property
    def sample_rate_hz(self) -> int:
        """Of the generated audio."""
        return self.audio.sample_rate_hz

    @property
    def default_duration_seconds(self) -> float:
        """Of clips whose length is not asked for."""
        return min(_DEFAULT_SECONDS, self.max_duration_seconds)

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
            plan = self._plan(settings)
            meter = None if settings.accelerator is None else CostMeter(settings.accelerator)
            for first in range(0, len(clips), settings.batch_size):
                self._latents(clips[first : first + settings.batch_size], settings, plan, meter)

    def _plan(self, settings: GenerationSettings) -> _Plan:
        """Raises ValueError for what the pipeline cannot do, and for a recording that cannot be read."""
        check_pipeline_settings(settings, type(self.audio))
        guidance = settings.guidance or ClassifierFreeGuidance()
        self.audio.check_guidance(guidance.scale, edits=settings.source is not None)
        method = guidance, settings.num_steps or DEFAULT_STEPS
        match settings.source:
            case Edit(file, mask, downmix):
                return self._edit(self._read(file, "edit", downmix), mask, *method)
            case Variation(file, strength, downmix):
                return self._variation(self._read(file, "init", downmix), strength, *method)
            case _:
                seconds = settings.duration_seconds or self.default_duration_seconds
                self._check_duration("duration_seconds", seconds)
                negative = settings.negative_prompt or None
                make = partial(self.audio.latents, negative_prompt=negative, duration_seconds=seconds)
                return _Plan(make, self._cut(seconds), {"duration_seconds": seconds}, *method, seconds)

    def _check_duration(self, what: str, seconds: float) -> None:
        if seconds > self.max_duration_seconds:
            raise ValueError(f"{what} must be at most {self.max_duration_seconds:g}, got {seconds}")

    def _cut(self, seconds: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        num_samples = max(1, round(seconds * self.sample_rate_hz))
        return lambda audio: crop(self.audio.level(audio), num_samples)

    def _read(self, file: str | Path, option: str, downmix: str) -> Recording:
        return Recording.read(Path(file), self.sample_rate_hz, option, downmix, self.audio.channels)

    def _edit(
        self, recording: Recording, mask: EditMask | EditMasks, guidance: ClassifierFreeGuidance, num_steps: int
    ) -> _Plan:
        window = mask.window(recording)
        self._check_duration("the mask and its boundaries", (window.end - window.start) / self.sample_rate_hz)
        first, last = window.mask_start - window.start, window.mask_end - window.start
        seen = window.crop(recording.samples).to(self.device)
        seconds = window.total / self.sample_rate_hz
        kept = window.kept(recording.samples).shape[-1]
        return _Plan(
            partial(self.audio.inpaint, recording=seen, start=first, end=last),
            lambda audio: paste_fitted(recording.samples, audio, window),
            {"duration_seconds": seconds, "edit": {**recording.describe(), **mask.describe()}},
            guidance,
            num_steps,
            seconds,
            inf if kept else PEAK_CEILING,  # kept samples come back bit by bit
        )

    def _variation(
        self, recording: Recording, strength: float, guidance: ClassifierFreeGuidance, num_steps: int
    ) -> _Plan:
        seconds = recording.duration_seconds
        self._check_duration(f"init={recording.file}", seconds)
        make = partial(self.audio.vary, recording=recording.samples.to(self.device), strength=strength)
        description = {"duration_seconds": seconds, "init": {**recording.describe(), "strength": strength}}
        return _Plan(make, self._cut(seconds), description, guidance, num_steps, seconds)

    def _generate_clips(self, clips: Sequence[Clip], settings: GenerationSettings) -> Generation:
        plan, solver = self._plan(settings), chosen_solver(settings)
        guidance, num_steps = plan.guidance, plan.num_steps
        name = type(self.audio.pipeline.scheduler).__name__ if solver is None else solver.name
        run = (self.model_hash, name if solver is None else solver.label, num_steps, guidance.scale)
        uncached = GenerationSettings(
            guidance=guidance.constant(), batch_size=settings.batch_size, solver=settings.solver, eta=settings.eta
        )
        calibrate_missing(settings.accelerator, run, calibration_prompts(()), uncached, self.denoise_clips)
        meter = None if settings.accelerator is None else CostMeter(settings.accelerator)
        timings, rows = Timings(), []
        for first in range(0, len(clips), settings.batch_size):
            batch = clips[first : first + settings.batch_size]
            with timings.measured("denoise_seconds", self.device):
                latents = self._latents(batch, settings, plan, meter)
            with timings.measured("decode_seconds", self.device), torch.no_grad():
                rows.append(plan.finish(self.audio.decode(latents).float().cpu()))
        audio, gains = (torch.cat(part) for part in zip(*rows, strict=True))
        description = {
            **plan.description,
            **settings.describe(guidance, name, num_steps),
            **({} if meter is None else meter.describe()),
            "sample_rate_hz": self.sample_rate_hz,
            "precision": self.precision,
            **({} if self.quantised is None else {"quantise": self.quantised}),
            **({"adapters": used} if (used := self._adapters.describe()) else {}),
            "model_hash": self.model_hash,
            **settings.facts,
        }
        audio, rate_hz = settings.finish(audio, self.sample_rate_hz), self.sample_rate_hz
        made = clips, audio, rate_hz, description, timings, plan.peak_ceiling, gains
        return Generation(*made, machine_name(self.device), min(settings.batch_size, len(clips)))

    def _latents(
        self, clips: Sequence[Clip], settings: GenerationSettings, plan: _Plan, meter: CostMeter | None
    ) -> Tensor:
        prompts, seeds = [clip.prompt for clip in clips], [clip.seed for clip in clips]
        solver = chosen_solver(settings)
        half = computing_in(self.precision, self.device, autocast=True)
        if solver is not None and isinstance(self.audio, StableAudio):
            request = prompts, settings.negative_prompt or None, plan.duration_seconds
            with half:
                return self.audio.solve(*request, seeds, solver, plan.guidance, meter, settings.progress)
        pipeline, scale = self.audio.pipeline, plan.guidance.scale
        with (
            half,
            self.audio.following(settings.progress),
            nullcontext() if meter is None else accelerated(self.audio.denoiser, pipeline.scheduler, scale, meter),
        ):
            return plan.make(
                prompts,
                num_inference_steps=plan.num_steps,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **({"lyrics": settings.lyrics} if settings.lyrics else {}),
            )


def open_generator(
    system: str | Path,
    device: str | torch.device = "cpu",
    max_duration_seconds: float = 60.0,
    hub_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    codec_path: str | Path | None = None,
    adapters: Adapters = (),
) -> TextToAudio | PipelineToAudio:
    """Whatever `system` names, ready to generate: a published system or pipeline, a folder, or a checkpoint.

    A pipeline of diffusers is known by the `model_index.json` of its folder, or of its repository on the hub.

    Args:
        codec_path: as for `load_system`.
        adapters: as for `TextToAudio.use_adapters`.
        hub_dir: a folder laid out as the hub is, instead of the network; None is FOLEY_HUB_DIR, or else the network.
        cache_dir, overrides: of a published one, as for `load_published`.

    Raises CheckpointError where something cannot be had.
    """
    published = codec_path is None and system_config(system, hub_dir=hub_dir) is not None
    if published:
        loaded = load_published(system, hub_dir, cache_dir, overrides)
    else:
        loaded = load_system(fetched(system, hub_dir), codec_path=codec_path)
    generator: TextToAudio | PipelineToAudio
    if isinstance(loaded, System):
        generator = TextToAudio(loaded, device, max_duration_seconds)
    else:
        generator = PipelineToAudio(loaded, device, max_duration_seconds)
    generator.use_adapters(adapters)
    return generator
