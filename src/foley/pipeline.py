"""`TextToAudio`: the one object that a user of a trained system needs."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from foley.diffusion.generate import clip_size, embed, generate_latents
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.sampler import Progress
from foley.diffusion.solver import Solver
from foley.diffusion.types import Accelerator
from foley.hashing import hash_module
from foley.reporting.html import Card
from foley.reporting.samples import Sample, write_samples
from foley.system import System, load_system, save_system

MAX_PROMPT_CHARACTERS = 10_000


def resolve_device(name: str) -> torch.device:
    """A torch device by name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@dataclass
class Timings:
    """Wall-clock seconds spent in each stage of a generation, all items together."""

    text_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        return self.text_seconds + self.denoise_seconds + self.decode_seconds


@dataclass(frozen=True)
class Generation:
    """What came out: `audio` `[N, 1, T]` on the CPU, one row per prompt, and everything needed to make it again."""

    audio: Tensor
    sample_rate_hz: int
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    timings: Timings

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
        rows = zip(self.prompts, self.seeds, self.audio[:, 0], notes or [{}] * len(self.prompts), strict=True)
        samples = [Sample(*row) for row in rows]
        settings = {**self.settings, **(more_settings or {})}
        return write_samples(directory, samples, self.sample_rate_hz, settings, asdict(self.timings), title)


class TextToAudio:
    """Generates audio from captions with a trained system.

    Args:
        system: its modules; they are put in eval mode and moved to `device`.
        device: where to run.
        max_duration_seconds: longer requests are refused; raise it knowingly, for quality falls off beyond the
            training length and memory grows with the square of the duration.
    """

    def __init__(self, system: System, device: str | torch.device = "cpu", max_duration_seconds: float = 60.0) -> None:
        self.system = system
        self.process = system.process
        self.device = torch.device(device)
        self.max_duration_seconds = max_duration_seconds
        modules: dict[str, Any] = {name: module.eval().to(self.device) for name, module in system.modules.items()}
        self.denoiser, self.text = modules["denoiser"], modules["text"]
        self.codec, self.normaliser = modules["codec"], modules["normaliser"]
        self.model_hash = hash_module(self.denoiser)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", max_duration_seconds: float = 60.0) -> Self:
        """From an exported system directory or a diffusion training checkpoint; raises CheckpointError."""
        return cls(load_system(Path(path)), device, max_duration_seconds)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Export as a system directory, floating weights as `dtype` (None keeps float32)."""
        save_system(self.system, Path(directory), dtype)

    @property
    def sample_rate_hz(self) -> int:
        """Of the generated audio."""
        rate: int = self.codec.sample_rate_hz
        return rate

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        duration_seconds: float = 5.0,
        seeds: Sequence[int] | None = None,
        guidance: ClassifierFreeGuidance | None = None,
        solver: str = "ddim",
        num_steps: int = 50,
        accelerator: Accelerator | None = None,
        negative_prompt: str = "",
        batch_size: int = 8,
        progress: Progress = iter,
    ) -> Generation:
        """Audio for each prompt. An item depends on its prompt, seed and settings, not on the rest of its batch.

        Args:
            prompts: captions; the empty one asks for an unconditional sample.
            seeds: one per prompt; by default 0, 1, 2, ...
            guidance: by default w = 3 without rescale.
            solver: a name out of `foley.diffusion.solver.SOLVERS`.
            accelerator: attached to the denoiser for the length of each run.
            negative_prompt: what guidance leads away from.
            batch_size: prompts denoised together.
            progress: wraps the range of evaluations of each batch.

        Raises:
            ValueError: for a request that cannot be met; nothing has been computed then.
            RuntimeError: where the result is not finite.
        """
        prompts = list(prompts)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        guidance = guidance or ClassifierFreeGuidance()
        self._check(prompts, duration_seconds, seeds, negative_prompt, batch_size)
        plan = Solver(solver, num_steps)
        plan.build(self.process)  # refuses a mismatch before anything is computed
        num_samples, num_frames = clip_size(duration_seconds, self.sample_rate_hz, self.codec.hop_samples)
        timings = Timings()
        with self._timed(timings, "text_seconds"):
            negative = embed(self.text, [negative_prompt]) if guidance.needs_negative else None
        rows = []
        for start in range(0, len(prompts), batch_size):
            items = slice(start, start + batch_size)
            with self._timed(timings, "text_seconds"):
                positive = embed(self.text, prompts[items])
            with self._timed(timings, "denoise_seconds"):
                latent = generate_latents(
                    self.denoiser,
                    self.process,
                    positive,
                    negative,
                    seeds[items],
                    num_frames,
                    guidance,
                    plan,
                    accelerator,
                    self.device,
                    progress,
                )
            with self._timed(timings, "decode_seconds"):
                rows.append(self.codec.decode(self.normaliser.denormalise(latent))[..., :num_samples].cpu())
        audio = torch.cat(rows)
        if not bool(audio.isfinite().all()):
            raise RuntimeError(
                f"solver {solver!r} with {num_steps} steps and guidance scale {guidance.scale} gave audio that is not "
                "finite; lower the guidance scale, or take more steps"
            )
        settings = self._settings(duration_seconds, guidance, plan, negative_prompt)
        return Generation(audio, self.sample_rate_hz, prompts, seeds, settings, timings)

    def _settings(
        self, duration_seconds: float, guidance: ClassifierFreeGuidance, solver: Solver, negative_prompt: str
    ) -> dict[str, Any]:
        return {
            "duration_seconds": duration_seconds,
            "guidance_scale": guidance.scale,
            "guidance_rescale": guidance.rescale,
            "solver": solver.name,
            "num_steps": solver.num_steps,
            "negative_prompt": negative_prompt,
            "prediction": self.process.prediction,
            "sample_rate_hz": self.sample_rate_hz,
            "model_hash": self.model_hash,
        }

    def _check(
        self, prompts: list[str], duration_seconds: float, seeds: list[int], negative_prompt: str, batch_size: int
    ) -> None:
        if not prompts:
            raise ValueError("no prompts given; the empty string asks for an unconditional sample")
        for prompt in (*prompts, negative_prompt):
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise ValueError(
                    f"a prompt has {len(prompt)} characters ({prompt[:40]!r}...); at most {MAX_PROMPT_CHARACTERS}"
                )
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed per prompt")
        if not 0 < duration_seconds <= self.max_duration_seconds:
            raise ValueError(
                f"duration_seconds must be above 0 and at most {self.max_duration_seconds} (max_duration_seconds), "
                f"got {duration_seconds}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    @contextmanager
    def _timed(self, timings: Timings, field: str) -> Iterator[None]:
        """Add the block's duration to `timings`; waits for the GPU so that stages are told apart."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        setattr(timings, field, getattr(timings, field) + time.perf_counter() - start)
