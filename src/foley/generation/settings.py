"""How audio is asked for, and what comes back."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foley.core.logs import get_logger
from foley.data.audio import PEAK_CEILING
from foley.diffusion.consistency import Consistency, ConsistencySolver
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance, KnownLatent
from foley.diffusion.sampler import Progress, Start
from foley.diffusion.solver import CONSISTENCY, Solver
from foley.diffusion.windows import Windows
from foley.reporting.samples import Card, Sample, write_samples

MAX_PROMPT_CHARACTERS = 10_000
_log = get_logger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate, the same for every item of a request.

    Args:
        guidance: by default w = 3 without rescale.
        any_guidance_scale: let a student take scales that it was not distilled with.
        solver: a name out of `foley.diffusion.solver.SOLVERS`; "consistency" for a student.
        num_steps: of the solver; Heun's evaluate the denoiser nearly twice as often.
        accelerator: attached to the denoiser for the length of each run.
        negative_prompt: what guidance leads away from; without effect at w = 1.
        batch_size: prompts denoised together; ValueError below 1.
        progress: wraps the range of evaluations of each batch.
        window_seconds: generate longer clips in windows of this length, see `foley.diffusion.windows`; None does not.
        overlap_seconds: of neighbouring windows, at least.
        decode_chunk_seconds: decode longer clips in chunks of this length, which bounds the memory and changes
            nothing else (`foley.generation.decoding`); None decodes all at once. ValueError unless positive.
    """

    guidance: ClassifierFreeGuidance = field(default_factory=ClassifierFreeGuidance)
    solver: str = "ddim"
    num_steps: int = 50
    accelerator: Accelerator | None = None
    negative_prompt: str = ""
    batch_size: int = 8
    progress: Progress = iter
    window_seconds: float | None = None
    overlap_seconds: float = 1.0
    decode_chunk_seconds: float | None = 10.0
    any_guidance_scale: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.decode_chunk_seconds is not None and not self.decode_chunk_seconds > 0:
            raise ValueError(f"decode_chunk_seconds must be above 0, or null, got {self.decode_chunk_seconds}")
        check_prompt_length(self.negative_prompt)
        if self.negative_prompt and not self.guidance.needs_negative:
            _log.warning("negative_prompt=%r has no effect at guidance scale 1", self.negative_prompt)

    @classmethod
    def of_student(cls, student: Consistency, **options: Any) -> "GenerationSettings":
        """With a student's defaults: consistency sampling in two steps, the scale nearest to w = 3 that it knows."""
        scale = student.nearest_scale(ClassifierFreeGuidance().scale)
        defaults: dict[str, Any] = {"solver": CONSISTENCY, "num_steps": 2, "guidance": ClassifierFreeGuidance(scale)}
        return cls(**(defaults | options))

    def plan(self, student: Consistency | None) -> Solver:
        """The solver; raises ValueError for one that is unknown or not for this kind of system, or impossible steps."""
        if student is None:
            return Solver(self.solver, self.num_steps)
        if self.solver != CONSISTENCY:
            raise ValueError(
                f"solver {self.solver!r} cannot sample this system, a student of consistency distillation; "
                f"leave the solver out, or take {CONSISTENCY!r}"
            )
        return ConsistencySolver(self.num_steps, student)

    def guide(self, student: Consistency | None) -> ClassifierFreeGuidance:
        """The guidance; raises ValueError for a student's where it has not seen the scale or cannot take the rest."""
        if student is None:
            return self.guidance
        if self.negative_prompt:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r}: a student was distilled with the empty one; leave it out"
            )
        return student.guidance(self.guidance, self.any_guidance_scale)

    def chunk_frames(self, frames_per_second: float) -> int | None:
        """Latent frames to decode at a time."""
        if self.decode_chunk_seconds is None:
            return None
        return max(1, round(self.decode_chunk_seconds * frames_per_second))

    def windows(self, num_frames: int, frames_per_second: float) -> Windows | None:
        """Of a clip of so many latent frames; None where it is no longer than a window.

        Raises ValueError where the overlap does not fit.
        """
        if self.window_seconds is None or num_frames <= (window := round(self.window_seconds * frames_per_second)):
            return None
        return Windows(num_frames, window, round(self.overlap_seconds * frames_per_second))

    def describe(self) -> dict[str, Any]:
        """What the JSON of each clip says of these settings."""
        windows = {"window_seconds": self.window_seconds, "overlap_seconds": self.overlap_seconds}
        return {
            **(windows if self.window_seconds is not None else {}),
            "guidance_scale": self.guidance.scale,
            "guidance_rescale": self.guidance.rescale,
            "solver": self.solver,
            "num_steps": self.num_steps,
            "negative_prompt": self.negative_prompt,
        }

    def check_finite(self, audio: Tensor) -> None:
        """Raises RuntimeError where the result of these settings is not finite."""
        if not bool(audio.isfinite().all()):
            raise RuntimeError(
                f"solver {self.solver!r} with {self.num_steps} steps and guidance scale {self.guidance.scale} gave "
                "audio that is not finite; lower the guidance scale, or take more steps"
            )


@dataclass(frozen=True)
class GenerationRequest:
    """Clips asked for: prompts, a seed for each, and settings that they share."""

    prompts: list[str]
    seeds: list[int]
    settings: GenerationSettings

    @classmethod
    def of(
        cls, prompts: Sequence[str], seeds: Sequence[int] | None, settings: GenerationSettings
    ) -> "GenerationRequest":
        """With the seeds 0, 1, 2, ... by default.

        Raises ValueError where there is no prompt, one is too long, or there are more or fewer seeds.
        """
        if not prompts:
            raise ValueError("no prompts given; the empty string asks for an unconditional sample")
        for prompt in prompts:
            check_prompt_length(prompt)
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed per prompt")
        return cls(list(prompts), list(seeds), settings)


@dataclass(frozen=True)
class Canvas:
    """What a request is generated onto.

    Args:
        num_frames: L.
        finish: decoded audio `[B, 1, L * hop]` to the result `[B, 1, T]`, on the CPU.
        description: what the JSON of each clip says of it.
        known: latent frames that are given.
        start: a latent to begin at instead of pure noise.
        peak_ceiling: as `foley.data.audio.write_wav` takes it.
    """

    num_frames: int
    finish: Callable[[Tensor], Tensor]
    description: Mapping[str, Any]
    known: KnownLatent | None = None
    start: Start | None = None
    peak_ceiling: float = PEAK_CEILING


@dataclass
class Timings:
    """Wall-clock seconds spent in each stage of a generation, all items together."""

    encode_seconds: float = 0.0
    text_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        return self.encode_seconds + self.text_seconds + self.denoise_seconds + self.decode_seconds

    @contextmanager
    def measured(self, field: str, device: torch.device) -> Iterator[None]:
        """Add the block's duration to `field`; waits for the GPU so that stages are told apart."""
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setattr(self, field, getattr(self, field) + time.perf_counter() - start)


@dataclass(frozen=True)
class Generation:
    """What came out: `audio` `[N, channels, T]` on the CPU, one row per prompt, and all it takes to make it again.

    `prompt_notes` are what the JSON of each clip is to say of its prompt; none where they are empty.
    """

    audio: Tensor
    sample_rate_hz: int
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    timings: Timings
    peak_ceiling: float = PEAK_CEILING
    prompt_notes: Sequence[Mapping[str, Any]] = ()

    def write(
        self,
        directory: Path,
        title: str | None = None,
        notes: Sequence[Mapping[str, str]] | None = None,
        more_settings: Mapping[str, Any] | None = None,
    ) -> tuple[Path, list[Card]]:
        """A folder of the clips, as `foley.reporting.samples.write_samples` describes; returns its page and cards.

        Args:
            notes: what else the JSON of each clip is to hold, such as its label.
            more_settings: what the caller knows of how the clips were made.
        """
        settings, timings = {**self.settings, **(more_settings or {})}, asdict(self.timings)
        samples = self.samples(notes)
        return write_samples(directory, samples, self.sample_rate_hz, settings, timings, title, self.peak_ceiling)

    def samples(self, notes: Sequence[Mapping[str, str]] | None = None) -> list[Sample]:
        """Its clips, mono ones as `[T]`; `notes` as for `write`."""
        clips = self.audio[:, 0] if self.audio.shape[1] == 1 else self.audio
        none: Sequence[Mapping[str, Any]] = [{}] * len(self.prompts)
        both = ({**own, **given} for own, given in zip(self.prompt_notes or none, notes or none, strict=True))
        rows = zip(self.prompts, self.seeds, clips, both, strict=True)
        return [Sample(*row) for row in rows]


def check_prompt_length(prompt: str) -> None:
    """Raises ValueError for a prompt that no one can have meant."""
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"a prompt has {len(prompt)} characters ({prompt[:40]!r}...); at most {MAX_PROMPT_CHARACTERS}")
