"""What the page does, free of Gradio: its fields become requests of the API, and its visitors' sounds are kept.

The page is a client of the service as the routes of HTTP are: the same models check its fields, the same line takes its
jobs, and what is refused is refused in the same words.
"""

import asyncio
import json
import math
import secrets
import shutil
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from fastapi import HTTPException, UploadFile
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from foley.accel.combined import NoAcceleration
from foley.core.files import one_line, write_json
from foley.data.audio import read_channels
from foley.data.ordering import evenly_spaced
from foley.generation.editing import EditMasks
from foley.generation.options import OPTION_NUMBERS
from foley.generation.pipeline_to_audio import DEFAULT_STEPS
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.reporting.plots import draw_sheet, waveform_outline
from foley.serving.engine import Served
from foley.serving.jobs import DEFAULT_ACCELERATOR, STUDENT, Job
from foley.serving.schema import EditForm, GenerateBody, SoundBody, VariationForm, problems
from foley.serving.service import Service
from foley.serving.sounds import Sound, check_length, encode, readable

_BODIES: dict[str, type[SoundBody]] = {"generate": GenerateBody, "edit": EditForm, "vary": VariationForm}
_LOOK_SECONDS = 0.1  # between two looks at a job
_MOST_EXAMPLES = 8
_MOST_TAKES = 30  # of a visitor; the oldest go first
_GUIDANCE_END = 10.0  # of the slider: the scale itself has no most
_OUTLINE_COLUMNS = 600
_MOST_LABEL_CHARACTERS = 60


# ---------------------------------------------------------------- what the fields may be


@dataclass(frozen=True)
class SliderRange:
    """A slider: its two ends, the step between its values, and where it stands at first."""

    least: float
    most: float
    step: float
    value: float


def _slider_range(name: str, most: float, step: float, value: float, least: float | None = None) -> SliderRange:
    """From the least that the API takes, on the grid of the step."""
    numbers = OPTION_NUMBERS[name]
    lowest = (numbers.least or 0.0) if least is None else least
    highest = most if numbers.most is None else min(most, numbers.most)
    return SliderRange(step * math.ceil(lowest / step - 1e-9), highest, step, min(value, highest))


def sliders(service: Service, model: str) -> dict[str, SliderRange]:
    """Of a model, by the names of the API: the limits of `/v1/models`, and the model's own choice as a beginning."""
    served, (answer,) = service.engine.models[model], (one for one in service.models() if one.name == model)
    steps, scale = _own_choice(served)
    seconds = answer.default_duration_seconds
    most_steps, lowest, highest = answer.max_steps, None, _GUIDANCE_END
    if isinstance(served.generator, TextToAudio) and (student := served.generator.student) is not None:
        lowest, highest = student.lowest_scale, student.highest_scale
        most_steps = min(most_steps, len(student.grid(served.generator.process)))
    return {
        "duration_seconds": _slider_range(
            "duration_seconds", answer.max_duration_seconds, 0.1 if round(seconds, 1) == seconds else 0.01, seconds
        ),
        "steps": _slider_range("steps", most_steps, 1, steps),
        "guidance_scale": _slider_range("guidance_scale", max(highest, scale), 0.1, scale, lowest),
        "num": _slider_range("num", answer.max_num, 1, 1),
    }


def _own_choice(served: Served) -> tuple[int, float]:
    """Steps and guidance scale of requests that name none."""
    settings, generator = served.defaults, served.generator
    if isinstance(generator, TextToAudio):
        steps = settings.choose_solver(generator.process, generator.student).num_steps
        return steps, settings.choose_guidance(generator.student).scale
    return settings.num_steps or DEFAULT_STEPS, settings.choose_guidance().scale


def strength_range() -> SliderRange:
    """Of variations."""
    return _slider_range("strength", 1.0, 0.05, VariationForm.model_fields["strength"].default)


def models(service: Service) -> list[str]:
    """The systems, without the students that are switched to."""
    return [
        name
        for name in service.engine.models
        if name.removesuffix(STUDENT) not in service.engine.models or not name.endswith(STUDENT)
    ]


def examples(service: Service) -> list[str]:
    """Captions that the first system knows, evenly spaced."""
    generator = next(iter(service.engine.models.values())).generator
    known = generator.known_captions.captions if isinstance(generator, TextToAudio) else ()
    return [known[index] for index in evenly_spaced(len(known), _MOST_EXAMPLES)]


def unaccelerated(served: Served) -> str | None:
    """The name by which a request has no acceleration."""
    plain = [name for name, accelerator in served.accelerators.items() if type(accelerator) is NoAcceleration]
    return plain[-1] if plain else None


def accelerator_names(served: Served) -> list[str]:
    """That of requests that name none is left out where it accelerates nothing and has a plainer name."""
    idle = (
        unaccelerated(served) not in (None, DEFAULT_ACCELERATOR)
        and type(served.accelerators[DEFAULT_ACCELERATOR]) is NoAcceleration
    )
    return [name for name in served.accelerators if not (idle and name == DEFAULT_ACCELERATOR)]


def say_marks(service: Service) -> str:
    """Whether files say where they come from, by tags and by a watermark; in Markdown."""
    defaults = next(iter(service.engine.models.values())).defaults
    tags = (
        "**Provenance is on**: each WAV says in its tags the software, the hash of the model, the prompt and the seed."
        if defaults.provenance
        else "**Provenance is off**: the WAVs hold no tags; `provenance=true` of `foley serve` puts them in."
    )
    watermark = (
        "**Watermark is on**: an inaudible one is in every sound; `foley detect FILE` finds it."
        if defaults.watermark
        else "**Watermark is off**: `watermark=true` of `foley serve` puts an inaudible one into every sound."
    )
    return f"{tags} {watermark}"


# ---------------------------------------------------------------- what a visitor has


@dataclass(frozen=True)
class Take:
    """A clip that was made, and its three files, which are named by the seed.

    Args:
        folder: of its own, whose name no one guesses.
        request: the number of the request in the session; clips made to be compared share it.
        fields: of the request, but for the accelerator.
        is_plain: without acceleration.
        seconds, denoise_seconds: that the whole request took to compute.
    """

    folder: Path
    seed: int
    request: int
    fields: Mapping[str, Any]
    accelerator: str
    is_plain: bool
    seconds: float
    denoise_seconds: float
    audio_seconds: float
    warnings: tuple[str, ...] = ()

    def file(self, suffix: str) -> Path:
        return self.folder / f"foley_{self.seed}.{suffix}"

    @property
    def title(self) -> str:
        """For the list of the history."""
        prompt = one_line(self.fields["prompt"]) or "(no prompt)"
        short = prompt if len(prompt) <= _MOST_LABEL_CHARACTERS else prompt[: _MOST_LABEL_CHARACTERS - 1] + "…"
        kind = {"generate": "", "edit": "edit: ", "vary": "variation: "}[self.fields["kind"]]
        accelerator = "" if self.is_plain else f", {self.accelerator}"
        return f"{kind}{short} | seed {self.seed}, {self.audio_seconds:g} s, {self.fields['model']}{accelerator}"


@dataclass
class Session:
    """A visitor's takes, the newest first, and the jobs that are under way."""

    takes: list[Take] = field(default_factory=list)
    jobs: set[Job] = field(default_factory=set)
    num_requests: int = 0

    def find(self, folder: str | None) -> Take | None:
        """By the name of its folder; None where it is no more."""
        return next((take for take in self.takes if take.folder.name == folder and take.folder.exists()), None)

    def choices(self) -> list[tuple[str, str]]:
        """Titles and folders' names of the takes that are kept."""
        return [(take.title, take.folder.name) for take in self.takes if take.folder.exists()]

    def plain(self, take: Take) -> Take | None:
        """The same clip of the same request without acceleration, the latest; None where there is none."""
        same = (other for other in self.takes if other.is_plain and other.fields == take.fields)
        return next((other for other in same if other.seed == take.seed), None)

    def cancel(self) -> None:
        for job in list(self.jobs):  # which the event loop changes meanwhile
            job.cancel()


@dataclass(frozen=True)
class Stage:
    """How far a request of the page is: in words, by the share that is done, and with its first take at the end."""

    words: str
    share: float
    take: Take | None = None


def _as_masks(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of the page as the API has them: the part that was dragged and `more_parts`, if there are any, as one."""
    more = fields.pop("more_parts", "")
    if not more.strip():
        return fields
    dragged = [fields.pop("mask_start_seconds"), fields.pop("mask_length_seconds")]
    return {**fields, "masks": json.dumps([dragged, *EditMasks.parse(more).masks])}


def forget_oldest(folder: Path, most_bytes: int) -> None:
    """Remove the files that were written first, as long as those of `folder` take more than `most_bytes`."""
    found = []
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # which another request has removed meanwhile
            if file.is_file():
                found.append((file, file.stat()))
    held = sum(facts.st_size for _, facts in found)
    for file, facts in sorted(found, key=lambda pair: pair[1].st_mtime):
        if held <= most_bytes:
            break
        file.unlink(missing_ok=True)
        held -= facts.st_size


class Studio:
    """The service as the page has it.

    Args:
        folder: where files are kept.
        most_bytes: of all visitors' files; the oldest go first.
    """

    def __init__(self, service: Service, folder: Path, most_bytes: int) -> None:
        self.service = service
        self._folder, self._most_bytes = folder, most_bytes
        self._kept: deque[tuple[Path, int]] = deque()
        self._lock, self._drawing = Lock(), Lock()

    async def make(self, session: Session, fields: Mapping[str, Any], compare: bool) -> AsyncIterator[Stage]:
        """Make what the fields ask for; where `compare`, without acceleration too.

        That comes second: what the first run of a process takes beyond the others is no saving of the accelerator's.
        Raises ValueError, in the words of the API, for what is refused, fails, or is cancelled.
        """
        session.num_requests += 1
        named, plain = str(fields["accelerator"]), unaccelerated(self.service.engine.models[fields["model"]])
        both = compare and plain is not None and plain != named
        first: Take | None = None
        for accelerator in (named, plain) if both else (named,):
            what = f" ({'without acceleration' if accelerator == plain else accelerator})" if both else ""
            async for stage in self._follow(session, {**fields, "accelerator": accelerator}):
                first = first or stage.take
                yield Stage(stage.words + what, stage.share)
        yield Stage("Done.", 1.0, first)

    async def _follow(self, session: Session, fields: Mapping[str, Any]) -> AsyncIterator[Stage]:
        try:
            job = await self._submit(fields)
            session.jobs.add(job)
            try:
                while not job.has_ended:
                    yield self._stage(job)
                    await asyncio.sleep(_LOOK_SECONDS)
                    job.expire()
            finally:  # whoever goes away gives the place back; nothing changes where it has ended
                job.cancel()
                session.jobs.discard(job)
            made = self.service.made(job)
        except HTTPException as error:
            raise ValueError(error.detail) from error
        takes = await run_in_threadpool(self._keep, session.num_requests, fields, job, made)
        session.takes = [*takes, *session.takes]
        await run_in_threadpool(self._forget, session, _MOST_TAKES)
        yield Stage("Made", 1.0, takes[0])

    async def _submit(self, fields: Mapping[str, Any]) -> Job:
        with ExitStack() as opened:
            given = _as_masks({name: value for name, value in fields.items() if name not in ("kind", "file")})
            if (path := fields.get("file")) is not None:
                given["file"] = UploadFile(opened.enter_context(Path(path).open("rb")), filename="recording")
            try:
                body = _BODIES[fields["kind"]](**given)
            except ValidationError as error:
                self.service.meters.count_refusal(422)
                raise ValueError(problems(error.errors())) from error
            return await self.service.submit(body)

    def _stage(self, job: Job) -> Stage:
        position = self.service.engine.position(job)
        if position is None:
            return Stage(f"Denoising: {100 * job.progress:.0f} %", job.progress)
        return Stage(f"Waiting, {position} before it" if position else "Waiting, next", 0.0)

    # ---------------------------------------------------------------- files

    def _keep(self, request: int, fields: Mapping[str, Any], job: Job, made: Generation) -> list[Take]:
        """Write the files of every clip."""
        timings, length = made.timings, made.audio.shape[-1] / made.sample_rate_hz
        same = {name: value for name, value in fields.items() if name != "accelerator"}
        took = timings.total_seconds, timings.denoise_seconds, round(length, 2)
        is_plain, takes = fields["accelerator"] == unaccelerated(self.service.engine.models[fields["model"]]), []
        for row, clip in enumerate(made.clips):
            own = self._folder / secrets.token_hex(16), clip.seed, request, same, fields["accelerator"], is_plain
            takes.append(Take(*own, *took, tuple(job.request.settings.without_effect())))
            self._write(takes[-1], encode(made, row, "wav"), made.audio[row].mean(dim=0), made.sample_rate_hz)
        return takes

    def _write(self, take: Take, sound: Sound, wave: torch.Tensor, sample_rate_hz: int) -> None:
        take.folder.mkdir(parents=True)
        take.file("wav").write_bytes(sound.content)
        write_json(take.file("json"), sound.facts)
        with self._drawing:  # Matplotlib's styles are those of the whole process
            draw_sheet(take.file("png"), [wave], [take.fields["prompt"]], sample_rate_hz)
        with self._lock:
            self._kept.append((take.folder, sum(file.stat().st_size for file in take.folder.iterdir())))
            while len(self._kept) > 1 and sum(size for _, size in self._kept) > self._most_bytes:
                shutil.rmtree(self._kept.popleft()[0], ignore_errors=True)

    def _forget(self, session: Session, most: int) -> None:
        for take in session.takes[most:]:
            shutil.rmtree(take.folder, ignore_errors=True)
        session.takes = session.takes[:most]
        with self._lock:
            self._kept = deque((folder, size) for folder, size in self._kept if folder.exists())

    def leave(self, session: Session) -> None:
        """The visitor is gone: so are the jobs and the files."""
        session.cancel()
        self._forget(session, 0)

    def say(self, session: Session, take: Take) -> str:
        """How long a take took, and what acceleration saved; in Markdown."""
        clips = "1 clip" if take.fields["num"] == 1 else f"{take.fields['num']} clips"
        computed = f"{take.seconds:.2f} s of computing for {clips} of {take.audio_seconds:g} s"
        lines = [f"{computed}, {take.denoise_seconds:.2f} s of it denoising.", *self._saved(session, take)]
        return "\n\n".join([*lines, *(f"Note: {warning}." for warning in take.warnings)])

    def _saved(self, session: Session, take: Take) -> list[str]:
        """Nothing of a take without acceleration."""
        if take.is_plain:
            return []
        if (plain := session.plain(take)) is None:
            return [
                f"Accelerator: {take.accelerator}. What it saves is not measured: the same request without it was not "
                "made in this session. Tick *Compare* for both."
            ]
        when = "for this comparison" if plain.request == take.request else "by itself, in this session"
        less = plain.denoise_seconds - take.denoise_seconds
        saved = f"saved **{less:.2f} s** ({less / plain.denoise_seconds:.0%})" if less >= 0 else f"lost {-less:.2f} s"
        return [
            f"Accelerator: {take.accelerator} {saved} of denoising: {take.denoise_seconds:.2f} s instead of "
            f"{plain.denoise_seconds:.2f} s, measured on the same request without acceleration, made {when}."
        ]

    def waveform(self, path: str | None) -> dict[str, Any] | None:
        """Of a recording: its outline as an SVG path, and its seconds; raises ValueError for what the API refuses."""
        if path is None:
            return None
        file = Path(path)
        check_length(file, self.service.limits.max_upload_seconds)
        with readable(file):
            samples, rate = read_channels(file)
        seconds = len(samples) / rate
        outline = waveform_outline(torch.from_numpy(samples).T, _OUTLINE_COLUMNS)
        return {"outline": outline, "seconds": seconds, "start": round(seconds / 3, 2), "length": round(seconds / 3, 2)}
