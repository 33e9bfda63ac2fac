"""What the server does with a request, whichever way it came: limits, uploads, jobs, answers, and what is counted."""

import asyncio
import base64
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.concurrency import run_in_threadpool

from foley.core.numbers import NumberRange, check_choice
from foley.generation.prompts import Clip
from foley.generation.result import Generation
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.serving import jobs
from foley.serving.engine import ComputedBatch, Engine
from foley.serving.jobs import Job, KeptJobs
from foley.serving.schema import (
    ClipAnswer,
    JobAnswer,
    ModelAnswer,
    RecordingForm,
    Refusal,
    SoundBody,
    SoundsAnswer,
)
from foley.serving.sounds import Sound, discard, encode, in_words, receive, upload_path

DRAWN_SEEDS = 2**32
_GRACE_SECONDS = 1.0  # beyond a job's time, for the thread that ends it
_CLIENT_GONE = 499  # nobody reads it but the log
_BATCH_CLIPS = (1, 2, 4, 8, 16, 32)
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, where the system could do more.

    Args:
        max_num: clips.
        max_steps: of the solver.
        max_upload_bytes: of a request's body.
        max_upload_seconds: that a recording lasts.
    """

    max_num: int
    max_steps: int
    max_upload_bytes: int
    max_upload_seconds: float

    def check(self, body: SoundBody, settings: GenerationSettings, max_duration_seconds: float) -> None:
        """Raises ValueError, in the words of the command line."""
        NumberRange(most=self.max_num, whole=True).check("num", body.num)
        if settings.num_steps is not None:
            NumberRange(most=self.max_steps, whole=True).check("steps", settings.num_steps)
        if settings.duration_seconds is not None:
            NumberRange(most=max_duration_seconds).check("duration_seconds", settings.duration_seconds)


class Meters:
    """What /metrics shows; of this server alone, also where a process has several."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self._jobs = Counter("foley_jobs", "Jobs that ended, by how", ["outcome"], **named)
        self._refused = Counter("foley_refused", "Requests that became no job, by status", ["status"], **named)
        self._audio = Counter("foley_audio_seconds", "Seconds of audio made", **named)
        self._clips = Histogram("foley_batch_clips", "Clips computed together", buckets=_BATCH_CLIPS, **named)
        self._batch = Histogram("foley_batch_seconds", "Seconds that a batch took", buckets=_SECONDS, **named)
        self._whole = Histogram("foley_job_seconds", "Seconds from submission to end", buckets=_SECONDS, **named)
        Gauge("foley_waiting_jobs", "Jobs that wait", **named).set_function(lambda: engine.num_waiting)
        Gauge("foley_running_jobs", "Jobs that run", **named).set_function(lambda: engine.num_running)
        engine.observe = self.count_batch

    def count_batch(self, batch: ComputedBatch) -> None:
        self._clips.observe(batch.num_clips)
        self._batch.observe(batch.seconds)

    def count_job(self, job: Job) -> None:
        self._jobs.labels(job.state).inc()
        self._whole.observe(job.timeout_seconds - job.remaining_seconds)
        if job.state == "done":
            made = job.outcome.result()
            self._audio.inc(len(made.clips) * made.audio.shape[-1] / made.sample_rate_hz)

    def count_refusal(self, status: int) -> None:
        self._refused.labels(str(status)).inc()


class Service:
    """The engine as HTTP has it."""

    def __init__(self, engine: Engine, limits: Limits, kept: KeptJobs) -> None:
        self.engine, self.limits, self.kept = engine, limits, kept
        self.meters = Meters(engine)

    def is_drained(self, since: float) -> bool:
        """Whether all is finished, and what ended later than `since`, of the monotonic clock, was fetched."""
        return self.engine.is_idle and self.kept.are_taken(since)

    def models(self) -> list[ModelAnswer]:
        return [self._model(name) for name in self.engine.models]

    def _model(self, name: str) -> ModelAnswer:
        served = self.engine.models[name]
        generator = served.generator
        return ModelAnswer(
            name=name,
            model_hash=generator.model_hash,
            sample_rate_hz=generator.sample_rate_hz,
            default_duration_seconds=served.defaults.duration_seconds or generator.default_duration_seconds,
            max_duration_seconds=generator.max_duration_seconds,
            is_student=isinstance(generator, TextToAudio) and generator.student is not None,
            accelerators=list(served.accelerators),
            **vars(self.limits),
        )

    # ---------------------------------------------------------------- from a request to a job

    async def submit(self, body: SoundBody) -> Job:
        """The job of a request; raises HTTPException where it becomes none."""
        job, path = None, None
        try:
            if isinstance(body, RecordingForm):
                path = upload_path()  # known here, should whoever sends it go away meanwhile
                await run_in_threadpool(receive, body.file.file, path, self.limits.max_upload_seconds)
                body.keep_at(str(path))
            job = self._submit(body)
        except (ValueError, jobs.QueueFullError, jobs.DrainingError) as error:
            raise self._exception(error) from error
        finally:
            if path is not None:
                _discard_with(path, job)
        job.outcome.add_done_callback(lambda outcome: self.meters.count_job(job))
        return job

    def _submit(self, body: SoundBody) -> Job:
        name = body.model or next(iter(self.engine.models))
        check_choice("model", name, self.engine.models)
        served = self.engine.models[name]
        check_choice("accelerator", body.accelerator, served.accelerators)
        settings = body.settings(served.defaults)
        self.limits.check(body, settings, served.generator.max_duration_seconds)
        first = secrets.randbelow(DRAWN_SEEDS) if body.seed is None else body.seed
        clips = tuple(Clip(body.prompt, seed) for seed in range(first, first + body.num))
        return self.engine.submit(jobs.SoundRequest(name, clips, settings, body.accelerator, body.format))

    def _exception(self, error: BaseException) -> HTTPException:
        problem = refusal(error, GenerationSettings())
        self.meters.count_refusal(problem.status)
        seconds = getattr(error, "retry_after_seconds", None)
        headers = None if seconds is None else {"Retry-After": str(seconds)}
        return HTTPException(problem.status, problem.detail, headers)

    # ---------------------------------------------------------------- from a job to an answer

    async def respond(self, request: Request, body: SoundBody) -> Response:
        """The sounds, once they are made; a client that goes away meanwhile has its job cancelled."""
        job = await self.submit(body)
        made = asyncio.wrap_future(job.outcome)
        made.add_done_callback(lambda future: future.cancelled() or future.exception())  # which is read from the job
        gone = asyncio.ensure_future(_client_gone(request))
        either: set[asyncio.Future[Any]] = {made, gone}
        try:
            within = job.remaining_seconds + _GRACE_SECONDS
            await asyncio.wait(either, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            job.expire()
            job.cancel()  # which changes nothing where it has ended
        if gone.done() and not gone.cancelled() and job.state == "cancelled":
            return Response(status_code=_CLIENT_GONE)
        return await self.sounds(request, job, range(body.num))

    async def sounds(self, request: Request, job: Job, rows: range) -> Response:
        """Clips of a job that has ended: one as it is, several or what is asked for so as JSON."""
        made = self.made(job)
        sounds = [await run_in_threadpool(encode, made, row, job.request.format) for row in rows]
        if len(sounds) == 1 and "application/json" not in request.headers.get("accept", ""):
            return _audio(job, sounds[0], made.clips[rows[0]].seed, made.settings["model_hash"])
        clips = [
            ClipAnswer(
                seed=made.clips[row].seed,
                media_type=sound.media_type,
                audio_base64=base64.b64encode(sound.content).decode(),
                facts=sound.facts,
            )
            for row, sound in zip(rows, sounds, strict=True)
        ]
        warnings = job.request.settings.without_effect()
        return JSONResponse(SoundsAnswer(job=job.id, warnings=warnings, clips=clips).model_dump())

    def made(self, job: Job) -> Generation:
        """Raises HTTPException for a job that failed, or has not ended."""
        if not job.has_ended:
            raise HTTPException(409, f"the job is {job.state}; its sounds are there once it is done")
        if error := job.outcome.exception():
            problem = refusal(error, job.request.settings)
            raise HTTPException(problem.status, problem.detail)
        return job.outcome.result()

    def describe(self, job: Job) -> JobAnswer:
        """How far a job is."""
        state = job.state  # read once: it may end meanwhile
        error = job.outcome.exception() if state in ("failed", "cancelled") else None
        count = len(job.request.clips) if state == "done" else 0
        return JobAnswer.model_validate(
            {
                "id": job.id,
                "state": state,
                "progress": job.progress,
                "position": self.engine.position(job),
                "model": job.request.model,
                "seeds": [clip.seed for clip in job.request.clips],
                "warnings": job.request.settings.without_effect(),
                "error": None if error is None else refusal(error, job.request.settings),
                "clips": [f"/v1/jobs/{job.id}/clips/{row}" for row in range(count)],
            }
        )


def _discard_with(path: Path, job: Job | None) -> None:
    """Remove an upload once its job has ended, or now where it became none."""
    if job is None:
        discard(path)
    else:
        job.outcome.add_done_callback(lambda outcome: discard(path))


def refusal(error: BaseException, settings: GenerationSettings) -> Refusal:
    """What a client is told of an error; what is a fault of ours stands in the log alone."""
    match error:
        case jobs.QueueFullError():
            return Refusal(status=429, detail=str(error))
        case jobs.DrainingError():
            return Refusal(status=503, detail=str(error))
        case jobs.JobTimeoutError():
            return Refusal(status=504, detail=str(error))
        case jobs.JobCancelledError():
            return Refusal(status=409, detail=str(error))
        case ValueError():
            return Refusal(status=422, detail=in_words(error, settings))
    return Refusal(status=500, detail="the generation failed; the log of the server says why")


def _audio(job: Job, sound: Sound, seed: int, model_hash: str) -> Response:
    """Its file is named by the seed: a prompt is no file name."""
    headers = {
        "X-Foley-Job": job.id,
        "X-Foley-Seed": str(seed),
        "X-Foley-Model": model_hash,
        **({"X-Foley-Warnings": "; ".join(warnings)} if (warnings := job.request.settings.without_effect()) else {}),
        "Content-Disposition": f'attachment; filename="foley_{seed}.{job.request.format}"',
    }
    return Response(sound.content, media_type=sound.media_type, headers=headers)


async def _client_gone(request: Request) -> None:
    """Returns once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
