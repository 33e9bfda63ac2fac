"""What clients send and get, as pydantic models; their limits are the tables that the command line checks by."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from foley.core.channels import DOWNMIXES
from foley.core.numbers import NumberRange
from foley.diffusion.context import CONSISTENCY
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import SOLVERS
from foley.generation.editing import Edit, EditMask, EditMasks, Variation
from foley.generation.options import MAX_PROMPT_CHARACTERS, OPTION_NUMBERS
from foley.generation.pipeline_to_audio import PUBLISHED_SOLVER
from foley.generation.settings import GenerationSettings
from foley.serving.jobs import DEFAULT_ACCELERATOR
from foley.serving.sounds import MEDIA_TYPES

_MOST_MASKS = 1000  # characters of their JSON
_MOST_NAME = 200  # characters: what is refused is said again
_MOST_WORDS = 800  # characters of a refusal: names of fields are sent back, of which there may be thousands


def _no_truth(value: Any) -> Any:
    """true is no number, though Python counts it as 1."""
    if isinstance(value, bool):
        raise ValueError("give a number")
    return value


def limits(numbers: NumberRange) -> Any:
    """A range of the command line's as pydantic has it, which the OpenAPI page shows."""
    ends: dict[str, Any] = {"ge": numbers.least, "le": numbers.most, "gt": numbers.above}
    return Field(**ends) if numbers.whole else Field(**ends, allow_inf_nan=False)


_Number = BeforeValidator(_no_truth)
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Name = Annotated[str, Field(max_length=_MOST_NAME)]
Seed = Annotated[int, limits(OPTION_NUMBERS["seed"]), _Number]
Num = Annotated[int, limits(OPTION_NUMBERS["num"]), _Number]
Steps = Annotated[int, limits(OPTION_NUMBERS["steps"]), _Number]
Eta = Annotated[float, limits(OPTION_NUMBERS["eta"]), _Number]
GuidanceScale = Annotated[float, limits(OPTION_NUMBERS["guidance_scale"]), _Number]
GuidanceRescale = Annotated[float, limits(OPTION_NUMBERS["guidance_rescale"]), _Number]
DurationSeconds = Annotated[float, limits(OPTION_NUMBERS["duration_seconds"]), _Number]
LoudnessLufs = Annotated[float, limits(OPTION_NUMBERS["loudness_lufs"]), _Number]
MaskSeconds = Annotated[float, limits(OPTION_NUMBERS["mask_start_seconds"]), _Number]
Masks = Annotated[str, Field(max_length=_MOST_MASKS)]
Strength = Annotated[float, limits(OPTION_NUMBERS["strength"]), _Number]

if TYPE_CHECKING:
    Format: TypeAlias = str
    Downmix: TypeAlias = str
    SolverName: TypeAlias = str
else:
    Format, Downmix = Literal[tuple(MEDIA_TYPES)], Literal[DOWNMIXES]
    SolverName = Literal[(*SOLVERS, CONSISTENCY, PUBLISHED_SOLVER)]


class SoundBody(BaseModel):
    """What every request says, by the names and in the limits of `foley sample`; the rest is the server's choice."""

    model_config = ConfigDict(extra="forbid")  # a misspelt name is answered, not passed over

    prompt: Prompt = Field(description="the caption; empty for an unconditional sample")
    negative_prompt: Prompt = Field(GenerationSettings.negative_prompt, description="what guidance leads away from")
    model: Name | None = Field(None, description="by its name in /v1/models; the first of them by itself")
    seed: Seed | None = Field(None, description="of the first clip, the others count up from it; null draws one")
    num: Num = Field(1, description="clips")
    steps: Steps | None = Field(None, description="of the solver")
    solver: SolverName | None = Field(None, description="the system's own by itself")
    eta: Eta | None = Field(None, description="of solver=ddim: how much of each step's noise is fresh")
    guidance_scale: GuidanceScale | None = Field(None, description="w; 1 turns guidance off")
    guidance_rescale: GuidanceRescale | None = Field(None, description="phi")
    accelerator: Name = Field(DEFAULT_ACCELERATOR, description="by its name in /v1/models")
    loudness_lufs: LoudnessLufs | None = Field(None, description="of each file, by EBU R128; not of an edit")
    format: Format = Field("wav", description="of the sounds")

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """With what the server takes where this request says nothing; raises ValueError as the settings do."""
        named = {name: getattr(self, name) for name in ("solver", "eta", "loudness_lufs")} | {"num_steps": self.steps}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        guidance = self._guidance(defaults.guidance)
        given |= self._source()
        return replace(defaults, negative_prompt=self.negative_prompt, guidance=guidance, **given)

    def _guidance(self, default: ClassifierFreeGuidance | None) -> ClassifierFreeGuidance | None:
        if (self.guidance_scale, self.guidance_rescale) == (None, None):
            return default
        return (default or ClassifierFreeGuidance()).at(self.guidance_scale, self.guidance_rescale)

    def _source(self) -> dict[str, Any]:
        return {}


class GenerateBody(SoundBody):
    """Sounds from text."""

    duration_seconds: DurationSeconds | None = Field(None, description="of each clip")

    def _source(self) -> dict[str, Any]:
        return {} if self.duration_seconds is None else {"duration_seconds": self.duration_seconds}


class RecordingForm(SoundBody):
    """What every request with an upload says."""

    file: UploadFile = Field(description="the recording, in any format of audio")
    downmix: Downmix = Field(Edit.downmix, description="how several channels become one")
    _path: str = ""  # where the server keeps the upload

    def keep_at(self, path: str) -> None:
        """Where the settings are to find the recording: a place that the server chose."""
        self._path = path


class EditForm(RecordingForm):
    """A recording of which a part is generated anew."""

    mask_start_seconds: MaskSeconds | None = Field(
        None, description="where that part begins; the recording's end continues it"
    )
    mask_length_seconds: MaskSeconds | None = Field(None, description="how much is replaced")
    masks: Masks | None = Field(None, description="several parts instead, as JSON: [[START, LENGTH], ...] in seconds")
    boundary_seconds: MaskSeconds = Field(EditMask.boundary_seconds, description="how much of each side the model sees")

    def _mask(self) -> EditMask | EditMasks:
        start, length, boundary = self.mask_start_seconds, self.mask_length_seconds, self.boundary_seconds
        if self.masks is not None and start is length is None:
            return EditMasks.parse(self.masks, boundary)
        if self.masks is None and start is not None and length is not None:
            return EditMask(start, length, boundary)
        raise ValueError("give mask_start_seconds and mask_length_seconds, or masks in the place of both")

    def _source(self) -> dict[str, Any]:
        source = {"source": Edit(self._path, self._mask(), self.downmix), "duration_seconds": None}
        # The server's own loudness is of other sounds; what a request says itself is refused beside an edit.
        return source | {"loudness_lufs": self.loudness_lufs}


class VariationForm(RecordingForm):
    """A recording, noised and denoised again."""

    strength: Strength = Field(Variation.strength, description="from 0, the recording, to 1, nothing of it")

    def _source(self) -> dict[str, Any]:
        return {"source": Variation(self._path, self.strength, self.downmix), "duration_seconds": None}


def problems(errors: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic finds wrong with each field, in one line, without what was sent: it may be long, or no JSON."""
    words = "; ".join(".".join(map(str, found["loc"])) + f": {found['msg']}" for found in errors)
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}..."


# ---------------------------------------------------------------- answers


class ClipAnswer(BaseModel):
    """A clip in an answer of several, or in one that was asked for as JSON."""

    seed: int
    media_type: str
    audio_base64: str
    facts: dict[str, Any] = Field(description="what `foley sample` writes into the JSON beside a WAV")


class SoundsAnswer(BaseModel):
    """Clips of a job that is done."""

    job: str
    warnings: list[str] = Field(description="what changed nothing in this request")
    clips: list[ClipAnswer]


class Problem(BaseModel):
    """Why there is no sound."""

    detail: str


class Refusal(Problem):
    """The same of a job, with the status that the answer would have had."""

    status: int


class JobAnswer(BaseModel):
    """How far a job is."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float = Field(description="the share of the denoiser's evaluations that are done")
    position: int | None = Field(description="how many jobs are before it; null where it does not wait")
    model: str
    seeds: list[int]
    warnings: list[str] = Field(description="what changes nothing in this request")
    error: Refusal | None = None
    clips: list[str] = Field(description="where the sounds are, once it is done")


class ModelAnswer(BaseModel):
    """A system that the server has, and what requests to it may ask for."""

    name: str
    model_hash: str
    sample_rate_hz: int
    default_duration_seconds: float
    max_duration_seconds: float
    is_student: bool
    accelerators: list[str]
    max_num: int
    max_steps: int
    max_upload_bytes: int
    max_upload_seconds: float
    formats: list[str] = list(MEDIA_TYPES)


Health = Literal["ok", "draining", "failed"]


class HealthAnswer(BaseModel):
    """Whether the server takes requests."""

    status: Health
    waiting: int
    running: int
