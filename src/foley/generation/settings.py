"""`GenerationSettings`: how to generate, the same for every clip of a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foley.core.logs import get_logger
from foley.diffusion.consistency import Consistency, ConsistencySolver
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import Progress
from foley.diffusion.solver import CONSISTENCY, Solver, default_solver
from foley.diffusion.windows import Windows
from foley.generation.editing import Control, Edit, Variation, fade_out
from foley.generation.marking import WATERMARK, require_watermark, watermarked
from foley.generation.options import IDLE, check_numbers, check_prompt_length

_log = get_logger(__name__)


def faded(audio: Tensor, samples: int) -> Tensor:
    """`audio [..., T]` that rises over so many samples at its beginning and falls at its end, at most half of it each.

    >>> faded(torch.ones(6), 2)
    tensor([0.1464, 0.8536, 1.0000, 1.0000, 0.8536, 0.1464])
    """
    samples = min(samples, audio.shape[-1] // 2)
    if samples == 0:
        return audio
    fall = fade_out(samples).to(audio)
    inside = fall.new_ones(audio.shape[-1] - 2 * samples)
    return audio * torch.cat([fall.flip(0), inside, fall])


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate. What is None is the system's own choice, made once it is known (`choose_solver`, ...).

    Args:
        duration_seconds: of each clip, by default as in the system's training, or 5 where it does not say; an edit or a
            variation has the length of its recording.
        source: the recording to start from, by an `Edit`, a `Variation` or a `Control`; None starts from noise alone.
        guidance: by default w = 3 without rescale; of a student, the scale nearest to it that it knows.
        any_guidance_scale: let a student take scales that it was not distilled with.
        solver: a name out of `foley.diffusion.solver.SOLVERS`, by default "ddim" or, of flow models, "euler_flow";
            "consistency" for a student.
        eta: of solver "ddim", in [0, 1]: how much of the noise of each step is fresh.
        num_steps: of the solver, by default 50, of a student 2; Heun's evaluate the denoiser nearly twice as often.
        accelerator: attached to the denoiser for the length of each run.
        lyrics: to be sung, by a system that takes them (ACE-Step).
        negative_prompt: what guidance leads away from; without effect at w = 1.
        batch_size: clips denoised together.
        progress: wraps the range of evaluations of each batch.
        window_seconds: generate longer clips in windows of this length, see `foley.diffusion.windows`; None does not.
        overlap_seconds: of neighbouring windows, at least.
        decode_chunk_seconds: decode longer clips in chunks of this length, which bounds the memory and changes
            nothing else (`foley.generation.decoding`); None decodes all at once.
        loudness_lufs: bring each file to this integrated loudness (EBU R128 asks for -23), or to a true peak of -1 dBTP
            where that comes first; None keeps the level, up to a peak of -1 dBFS. Not of an edit, which keeps samples.
        fade_seconds: of a ramp at both ends, so that no clip begins or ends with a click; `foley sample` and the server
            have one by default. What starts from a recording has none.
        provenance: each file's own tags say the software, the model's hash, the prompt and the seed.
        watermark: an inaudible one in the sound (`foley.generation.marking`); of an edit, in what is kept too.
        facts: what else the JSON of each clip is to say of its settings, such as the name of the system.

    Raises ValueError, which names the field, for a number outside `foley.generation.options.NUMBERS`, and
    ModuleNotFoundError for a watermark without its package.

    >>> settings = GenerationSettings(duration_seconds=2.0, num_steps=25)
    >>> settings.choose_solver(DiffusionProcess())
    Solver(name='ddim', num_steps=25, eta=0.0)
    >>> settings.choose_guidance().scale
    3.0
    """

    duration_seconds: float | None = None
    source: Edit | Variation | Control | None = None
    guidance: ClassifierFreeGuidance | None = None
    solver: str | None = None
    eta: float = 0.0
    num_steps: int | None = None
    accelerator: Accelerator | None = None
    negative_prompt: str = ""
    lyrics: str = ""
    batch_size: int = 8
    progress: Progress = iter
    window_seconds: float | None = None
    overlap_seconds: float = 1.0
    decode_chunk_seconds: float | None = 10.0
    any_guidance_scale: bool = False
    loudness_lufs: float | None = None
    fade_seconds: float = 0.0
    provenance: bool = True
    watermark: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers(vars(self))
        check_prompt_length(self.negative_prompt)
        if self.watermark:
            require_watermark()
        if isinstance(self.source, Control) and self.window_seconds is not None:
            raise ValueError("window_seconds and control exclude each other: a recording is followed in one piece")
        if isinstance(self.source, Edit) and self.loudness_lufs is not None:
            raise ValueError(
                f"loudness_lufs={self.loudness_lufs:g} and edit exclude each other: an edit keeps the samples of its "
                "recording, and their level; leave loudness_lufs out"
            )

    def refuse_lyrics(self, taken: bool = False) -> None:
        """Raises ValueError where there are lyrics, and the system does not take them."""
        if self.lyrics and not taken:
            raise ValueError(f"lyrics={self.lyrics!r}: this system takes captions alone (ACE-Step sings); leave it out")

    def warn_without_effect(self) -> None:
        """Name each of `without_effect` in the log."""
        for words in self.without_effect():
            _log.warning("%s", words)

    def without_effect(self) -> list[str]:
        """Each option that differs from its default and yet changes nothing in this request, in words."""
        guidance = self.guidance or ClassifierFreeGuidance()
        default = GenerationSettings()
        idle = {
            "negative_prompt": self.negative_prompt and not guidance.needs_negative,
            "guidance_rescale": guidance.rescale and not guidance.needs_negative,
            "duration_seconds": self.duration_seconds is not None and self.source is not None,
            "overlap_seconds": self.overlap_seconds != default.overlap_seconds and self.window_seconds is None,
        }
        return [f"{name} has no effect {IDLE[name]}" for name, without_effect in idle.items() if without_effect]

    def choose_solver(self, process: DiffusionProcess, student: Consistency | None = None) -> Solver:
        """The solver that samples a system, a student where `student` is given.

        Raises ValueError for one that is unknown or not for this kind of system, and for impossible numbers of steps.
        """
        if student is not None and self.solver not in (None, CONSISTENCY):
            raise ValueError(
                f"solver {self.solver!r} cannot sample this system, a student of consistency distillation; "
                f"leave the solver out, or take {CONSISTENCY!r}"
            )
        given: dict[str, Any] = {"eta": self.eta} | ({} if self.num_steps is None else {"num_steps": self.num_steps})
        solver: Solver
        if student is None:
            solver = Solver(self.solver or default_solver(process), **given)
        else:
            solver = ConsistencySolver(consistency=student, **given)
        solver.build(process)  # whether it fits is known before anything is computed
        return solver

    def choose_guidance(self, student: Consistency | None = None) -> ClassifierFreeGuidance:
        """The guidance; raises ValueError for a student's where it has not seen the scale or cannot take the rest."""
        guidance = self.guidance or ClassifierFreeGuidance()
        if student is None:
            return guidance
        if self.negative_prompt:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r}: a student was distilled with the empty one; leave it out"
            )
        if self.guidance is None:
            guidance = ClassifierFreeGuidance(student.nearest_scale(guidance.scale))
        return student.guidance(guidance, self.any_guidance_scale)

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

    def fitting(self, denoiser: Any, num_frames: int, frames_per_second: float) -> "GenerationSettings":
        """In windows as long as learned positions reach, where that is not far enough and none were asked for."""
        positions = getattr(denoiser, "positions", None)
        if positions is None or num_frames <= positions.max_length or self.window_seconds is not None:
            return self
        learned, seconds = positions.max_length, positions.max_length / frames_per_second
        _log.info("%d frames exceed the %d learned positions: windows of %g s", num_frames, learned, seconds)
        return replace(self, window_seconds=seconds)

    @property
    def ramp_seconds(self) -> float:
        """Of `fade_seconds` what there is: a recording to start from has ends of its own."""
        return self.fade_seconds if self.source is None else 0.0

    def finish(self, audio: Tensor, sample_rate_hz: int) -> Tensor:
        """Generated audio `[N, channels, T]` with ramps at its ends, and with a watermark where there is to be one."""
        audio = faded(audio, round(self.ramp_seconds * sample_rate_hz))
        return watermarked(audio, sample_rate_hz) if self.watermark else audio

    def describe(self, guidance: ClassifierFreeGuidance, solver: str, num_steps: int) -> dict[str, Any]:
        """What the JSON of each clip says of these settings, and of what was chosen by them."""
        windows = {"window_seconds": self.window_seconds, "overlap_seconds": self.overlap_seconds}
        return {
            **(windows if self.window_seconds is not None else {}),
            **guidance.describe(),
            "solver": solver,
            **({"eta": self.eta} if self.eta else {}),
            "num_steps": num_steps,
            "negative_prompt": self.negative_prompt,
            **({"lyrics": self.lyrics} if self.lyrics else {}),
            **({} if self.loudness_lufs is None else {"loudness_lufs": self.loudness_lufs}),
            "fade_seconds": self.ramp_seconds,
            "provenance": self.provenance,
            "watermark": WATERMARK if self.watermark else False,
        }
