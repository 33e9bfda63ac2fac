"""The HTTP API: what it answers to whom. `create_app` makes the application of a service."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import foley
from foley.serving.jobs import Job
from foley.serving.schema import (
    EditForm,
    GenerateBody,
    Health,
    HealthAnswer,
    JobAnswer,
    ModelAnswer,
    Problem,
    SoundsAnswer,
    VariationForm,
    problems,
)
from foley.serving.service import Service
from foley.serving.sounds import MEDIA_TYPES

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")
"""Names of the machine itself; a page elsewhere that has a name of its own point here is refused (DNS rebinding)."""
_GUARDED = ("/v1/", "/metrics")  # paths that want the key
_EVENTS_SECONDS = 0.1  # between two looks at a job
_MOST_WORDS_BYTES = 1 << 20  # of a body that is no upload: it is read whole into memory


@dataclass(frozen=True)
class Access:
    """Who is answered.

    Args:
        api_key: that requests must bring, as a bearer token or as X-API-Key; None asks for none.
        hosts: names by which the server may be called; "*" for any.
        origins: of pages elsewhere that browsers may let read the answers (CORS).
    """

    api_key: str | None = None
    hosts: Sequence[str] = LOCAL_HOSTS
    origins: Sequence[str] = ()

    def lets_in(self, headers: Mapping[str, str]) -> bool:
        """Whether a page elsewhere does not send its reader's browser here: forms need no CORS for that."""
        origin = headers.get("origin")
        if origin is None or origin in self.origins:
            return True
        try:
            return urlsplit(origin).netloc == headers.get("host")
        except ValueError:  # it is no address
            return False

    def opens(self, given: str) -> bool:
        """Whether this is the key, or none is asked for."""
        # In constant time: how long a comparison takes would tell how much of a guess is right.
        return self.api_key is None or secrets.compare_digest(given.encode(), self.api_key.encode())


def create_app(service: Service, access: Access = Access()) -> FastAPI:
    """The application; with its end the engine ends too."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(
        title="foley",
        description=foley.__doc__.partition("\n")[0] if foley.__doc__ else "",
        version=foley.__version__,
        lifespan=lifespan,
        form_limits={"max_files": 1, "max_fields": 40, "max_part_size": 1 << 16},
    )
    app.state.service, app.state.access = service, access
    app.include_router(_open)
    app.include_router(_guarded)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_middleware(_Door, access=access)
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts), www_redirect=False)
    app.add_middleware(_BodyLimits, max_bytes=service.limits.max_upload_bytes, seconds=service.engine.timeout_seconds)
    return app


class _Door:
    """Asks who is there before anything of a body is read: 403 for pages elsewhere, 401 without the key."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = None
        if scope["type"] == "http" and scope["path"].startswith(_GUARDED):
            refused = self._refuse(Request(scope))
        await (refused or self._app)(scope, receive, send)

    def _refuse(self, request: Request) -> Response | None:
        if not self._access.lets_in(request.headers):
            words = (
                f"pages of {request.headers['origin']} may not ask this server; cors_origins= of foley serve lets them"
            )
            return _turned_away(request, 403, words)
        if not self._access.opens(api_key(request.headers)):
            words = "give the server's key as a bearer token"
            return _turned_away(request, 401, words, {"WWW-Authenticate": "Bearer"})
        return None


def _turned_away(request: Request, status: int, words: str, headers: Mapping[str, str] | None = None) -> Response:
    request.app.state.service.meters.count_refusal(status)
    return JSONResponse({"detail": words}, status, headers)


def api_key(headers: Mapping[str, str]) -> str:
    """The key that a request brings, as a bearer token or as X-API-Key; or nothing."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else headers.get("x-api-key", "")


class _BodyLimits:
    """Answers 413 where a body is too large, and 408 where it has not come whole in time, byte by byte.

    FastAPI's own limit of size answers without saying what it is.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        until, is_whole = time.monotonic() + self._seconds, False
        headers = Headers(scope=scope)
        is_upload = headers.get("content-type", "").startswith("multipart/")
        most_bytes = self._max_bytes if is_upload else min(self._max_bytes, _MOST_WORDS_BYTES)
        num_bytes = int(headers.get("content-length", 0))  # as it is promised, and then as it comes
        come = 0

        async def receive_body() -> Message:
            nonlocal is_whole, come
            _check_size(scope, num_bytes, most_bytes)
            try:
                message = await asyncio.wait_for(receive(), None if is_whole else until - time.monotonic())
            except TimeoutError:
                raise _refused(scope, 408, f"the request did not come whole within {self._seconds:g} s") from None
            come += len(message.get("body", b""))
            _check_size(scope, come, most_bytes)
            is_whole = is_whole or not message.get("more_body", False)
            return message

        await self._app(scope, receive_body, send)


def _check_size(scope: Scope, num_bytes: int, most_bytes: int) -> None:
    if num_bytes > most_bytes:
        raise _refused(scope, 413, f"the request is larger than {most_bytes} bytes")


def _refused(scope: Scope, status: int, words: str) -> HTTPException:
    """Of a request that is not read to its end, after which its connection is of no use."""
    scope["app"].state.service.meters.count_refusal(status)
    return HTTPException(status, words, {"Connection": "close"})


async def _explain(request: Request, error: Exception) -> Response:
    """What is wrong with each field, without what was sent: it may be long, or no JSON."""
    assert isinstance(error, RequestValidationError)
    request.app.state.service.meters.count_refusal(422)
    return JSONResponse({"detail": problems([{**found, "loc": found["loc"][1:]} for found in error.errors()])}, 422)


# ---------------------------------------------------------------- who may


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _job(job_id: str, service: Annotated[Service, Depends(_service)]) -> Job:
    try:
        return service.kept.get(job_id)
    except KeyError:
        raise HTTPException(404, "there is no such job, or no more") from None


ServiceOf = Annotated[Service, Depends(_service)]
JobOf = Annotated[Job, Depends(_job)]
EditOf = Annotated[EditForm, Form(media_type="multipart/form-data")]
VariationOf = Annotated[VariationForm, Form(media_type="multipart/form-data")]

_refusals: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 408, 413, 422, 429, 503, 504)
}
_sounds: dict[int | str, dict[str, Any]] = {
    200: {"model": SoundsAnswer, "content": {media_type: {} for media_type in MEDIA_TYPES.values()}}
}
_open = APIRouter()
# For the page of requests alone, which asks for the key by them: `_Door` has looked at it before.
_schemes = HTTPBearer(auto_error=False), APIKeyHeader(name="X-API-Key", auto_error=False)
_guarded = APIRouter(dependencies=[Depends(scheme) for scheme in _schemes])


# ---------------------------------------------------------------- sounds, at once


@_guarded.post("/v1/audio/generate", response_class=Response, responses={**_refusals, **_sounds})
async def generate(body: GenerateBody, request: Request, service: ServiceOf) -> Response:
    """Sounds from text: one as it is, several (or with `Accept: application/json`) as JSON in base64."""
    return await service.respond(request, body)


@_guarded.post("/v1/audio/edit", response_class=Response, responses={**_refusals, **_sounds})
async def edit(form: EditOf, request: Request, service: ServiceOf) -> Response:
    """A recording with a part of it generated anew; every sample outside that part stays as it was."""
    return await service.respond(request, form)


@_guarded.post("/v1/audio/variations", response_class=Response, responses={**_refusals, **_sounds})
async def variations(form: VariationOf, request: Request, service: ServiceOf) -> Response:
    """A recording, noised and denoised again for the prompt."""
    return await service.respond(request, form)


# ---------------------------------------------------------------- sounds, later


@_guarded.post("/v1/jobs", status_code=202, responses=_refusals)
async def begin_generation(body: GenerateBody, service: ServiceOf) -> JobAnswer:
    """As /v1/audio/generate, answered before it is made."""
    return await _begin(body, service)


@_guarded.post("/v1/jobs/edit", status_code=202, responses=_refusals)
async def begin_edit(form: EditOf, service: ServiceOf) -> JobAnswer:
    """As /v1/audio/edit, answered before it is made."""
    return await _begin(form, service)


@_guarded.post("/v1/jobs/variations", status_code=202, responses=_refusals)
async def begin_variations(form: VariationOf, service: ServiceOf) -> JobAnswer:
    """As /v1/audio/variations, answered before it is made."""
    return await _begin(form, service)


async def _begin(body: GenerateBody | EditForm | VariationForm, service: Service) -> JobAnswer:
    job = await service.submit(body)
    service.kept.add(job)
    return service.describe(job)


@_guarded.get("/v1/jobs/{job_id}")
async def show_job(job: JobOf, service: ServiceOf) -> JobAnswer:
    """How far a job is, and where its sounds are once it is done."""
    return service.describe(job)


@_guarded.get("/v1/jobs/{job_id}/events", response_class=EventSourceResponse)
async def follow_job(job: JobOf, service: ServiceOf) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: the job whenever something of it changes, the last time when it has ended."""
    last = None
    while last is None or last.state in ("queued", "running"):
        now = service.describe(job)
        if now != last:
            yield ServerSentEvent(data=now, event=now.state)
        else:
            await asyncio.sleep(_EVENTS_SECONDS)
        last = now


@_guarded.get("/v1/jobs/{job_id}/clips/{row}", response_class=Response, responses=_sounds)
async def fetch_clip(row: int, job: JobOf, request: Request, service: ServiceOf) -> Response:
    """A clip of a job that is done; with `Accept: application/json` its settings too."""
    if not 0 <= row < len(job.request.clips):
        raise HTTPException(404, f"the job has {len(job.request.clips)} clips, counted from 0")
    answer = await service.sounds(request, job, range(row, row + 1))
    job.taken.add(row)
    return answer


@_guarded.delete("/v1/jobs/{job_id}")
async def end_job(job: JobOf, service: ServiceOf) -> JobAnswer:
    """Cancel a job, between two evaluations where it runs; one that has ended is forgotten."""
    if job.has_ended:
        service.kept.remove(job)
    job.cancel()
    return service.describe(job)


# ---------------------------------------------------------------- about the server


@_guarded.get("/v1/models")
async def list_models(service: ServiceOf) -> list[ModelAnswer]:
    """What there is, and what requests may ask of each."""
    return service.models()


@_guarded.get("/metrics", response_class=Response)
async def metrics(service: ServiceOf) -> Response:
    """In the text format of Prometheus."""
    return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)


@_open.get("/healthz", responses={503: {"model": HealthAnswer}})
async def health(response: Response, service: ServiceOf) -> HealthAnswer:
    """Whether the server takes requests; 503 where it does not."""
    engine = service.engine
    status: Health = "draining" if not engine.is_accepting else "ok" if engine.is_alive else "failed"
    response.status_code = 200 if status == "ok" else 503
    return HealthAnswer(status=status, waiting=engine.num_waiting, running=engine.num_running)
