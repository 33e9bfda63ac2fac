"""The page: fields, players and a history in a browser, by Gradio, mounted into the application of the API.

What it does lies in `foley.serving.studio`; here is how it looks, and who may open it.
"""

import base64
import binascii
import html
import json
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foley.generation.editing import EditMask
from foley.generation.options import OPTION_NUMBERS
from foley.serving.app import Access, api_key
from foley.serving.jobs import STUDENT
from foley.serving.service import DRAWN_SEEDS, Service
from foley.serving.studio import (
    Session,
    SliderRange,
    Stage,
    Studio,
    Take,
    accelerator_names,
    examples,
    forget_oldest,
    models,
    say_marks,
    sliders,
    strength_range,
)

PATH = "/page"
_HERE = Path(__file__).parent
_SESSION_SECONDS = 3600  # that a visitor's sounds are kept without a request
_CACHE_SECONDS = 600  # between two looks for old copies
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
_MONO_FONTS = ("ui-monospace", "Consolas", "monospace")
_FETCHING = ("/file=http", "/file/", "/proxy=")  # routes by which Gradio would fetch from elsewhere for a visitor
_WAVEFORM = """${ value && value.seconds ?
  "<div class='wave' role='img' aria-label='Waveform of the recording; drag to choose the part'>" +
  "<svg viewBox='0 0 1 1' preserveAspectRatio='none'><path d='" + value.outline + "'/></svg>" +
  "<div class='span' style='left:" + 100 * value.start / value.seconds + "%;width:" +
  Math.max(0, Math.min(100 * value.length / value.seconds, 100 - 100 * value.start / value.seconds)) + "%'></div>" +
  "</div><div class='ends'><span>0 s</span><span>drag over the part to make anew</span><span>" +
  value.seconds.toFixed(2) + " s</span></div>"
  : "<p>The waveform of the recording will be here: drag over the part to make anew.</p>" }"""
_TO_RESULT = "() => { if (innerWidth < 768) document.querySelector('#status').scrollIntoView({behavior: 'smooth'}) }"
_MOVE_SPAN = "(start, length, wave) => wave ? {...wave, start: start || 0, length: length || 0} : wave"


def mount_page(app: FastAPI, service: Service, access: Access, most_bytes: int) -> None:
    """Put the page at `PATH` of the application, where `/` leads, by the same rules.

    Args:
        most_bytes: of the files that visitors have made, and of Gradio's copies of those and of uploads; the oldest go
            first.
    """
    app.state.page_files = tempfile.TemporaryDirectory(prefix="foley-page-")  # which goes with the application
    folder = Path(app.state.page_files.name)
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")  # of this server alone, not the one that all users share
    page = Page(Studio(service, folder / "takes", most_bytes))
    app.get("/", include_in_schema=False)(lambda: RedirectResponse(f"{PATH}/"))
    gr.mount_gradio_app(
        app,
        page.blocks,
        PATH,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=service.limits.max_upload_bytes,
        ssr_mode=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=_MONO_FONTS, primary_hue="teal"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
    )
    forget = partial(forget_oldest, folder / "gradio", most_bytes)
    app.add_middleware(PageGuard, access=access, max_bytes=service.limits.max_upload_bytes, forget=forget)


class PageGuard:
    """Asks of what goes to the page what the routes of the API ask, whose dependencies a mounted application lacks.

    The key is the password of a browser's own question, with any user name, or comes as it does to the API.

    Args:
        forget: removes what is too much of the files that requests leave behind.
    """

    def __init__(self, app: ASGIApp, access: Access, max_bytes: int, forget: Callable[[], None]) -> None:
        self._app, self._access, self._max_bytes, self._forget = app, access, max_bytes, forget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused, leaves_files = None, False
        if scope["type"] == "http" and f"{scope['path']}/".startswith(f"{PATH}/"):
            request = Request(scope, receive)
            leaves_files = request.method == "POST"
            refused = self._refuse(request)
            is_json = request.headers.get("content-type", "").startswith("application/json")
            if refused is None and request.method == "POST" and is_json:
                body = await request.body()
                receive = _again(body, receive)
                if _names_address(body):
                    refused = PlainTextResponse("give a recording, not an address", 422)
        await (refused or self._app)(scope, receive, send)
        if leaves_files and refused is None:
            await run_in_threadpool(self._forget)

    def _refuse(self, request: Request) -> Response | None:
        if not self._access.lets_in(request.headers):
            return PlainTextResponse("pages elsewhere may not ask this server", 403)
        if not self._access.opens(_key(request.headers)):
            asks = {"WWW-Authenticate": 'Basic realm="foley: the key is the password", charset="UTF-8"'}
            return PlainTextResponse("give the server's key as the password", 401, asks)
        if any(route in request.url.path for route in _FETCHING):
            return PlainTextResponse("there is nothing here", 404)
        if "transfer-encoding" in request.headers:  # no browser sends what has no length
            return PlainTextResponse("give the length of the body", 411)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_bytes:
            return PlainTextResponse("more than max_upload_bytes", 413)
        return None


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def first() -> Message:
        return messages.pop() if messages else await receive()

    return first


def _names_address(body: bytes) -> bool:
    """Whether a file of a request lies elsewhere, from where Gradio would fetch it; or the request cannot be read."""

    def has_address(value: Any) -> bool:
        if isinstance(value, dict):
            return "://" in str(value.get("path")) or any(has_address(inner) for inner in value.values())
        return isinstance(value, list) and any(has_address(inner) for inner in value)

    try:
        return has_address(json.loads(body))
    except (ValueError, RecursionError):
        return True


def _key(headers: Mapping[str, str]) -> str:
    """That of a request, as the API takes it or as a browser sends a password; or nothing."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return api_key(headers)
    try:
        return base64.b64decode(given, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


class Page:
    """The fields, and what happens when they are used. `blocks` is Gradio's description of it."""

    def __init__(self, studio: Studio) -> None:
        self._studio, self._service = studio, studio.service
        self._models = models(self._service)
        self._ranges = sliders(self._service, self._models[0])
        self._fields: dict[str, Any] = {}
        with gr.Blocks(title="foley", analytics_enabled=False, delete_cache=(_CACHE_SECONDS, _SESSION_SECONDS)) as page:
            self._session = gr.State(Session(), time_to_live=_SESSION_SECONDS, delete_callback=studio.leave)
            device = next(iter(self._service.engine.models.values())).generator.device
            gr.Markdown(f"# foley\nSounds from text, by {', '.join(self._models)} on {device}.", elem_classes="heading")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._ask()
                with gr.Column(scale=6, min_width=320):
                    self._show()
            gr.Markdown(say_marks(self._service), elem_classes="marks")
            self._connect()
        page.queue(default_concurrency_limit=None, api_open=False)  # the line is the engine's
        self.blocks = page

    # ---------------------------------------------------------------- what is asked

    def _ask(self) -> None:
        fields, first = self._fields, self._models[0]
        fields["prompt"] = gr.Textbox(label="Prompt", lines=2, placeholder="a dog barks", elem_id="prompt")
        if known := examples(self._service):
            gr.Examples([[caption] for caption in known], [fields["prompt"]], label="Captions that the system knows")
        with gr.Row():
            fields["model"] = gr.Dropdown(
                self._models, value=first, label="System", visible=len(self._models) > 1, interactive=True
            )
            fields["student"] = gr.Checkbox(
                label="Student",
                info="the system distilled to a few steps: quick",
                visible=self._has_student(first),
                elem_id="student",
            )
        with gr.Tabs():
            with gr.Tab("From text"):
                fields["duration_seconds"] = _slider("Duration (s)", self._ranges["duration_seconds"])
                self._generate = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Tab("From a recording"):
                self._ask_recording()
        with gr.Accordion("Settings"):
            self._ask_how(accelerator_names(self._service.engine.models[first]))

    def _ask_how(self, accelerators: list[str]) -> None:
        fields = self._fields
        with gr.Row():
            fields["num"] = _slider("Clips", self._ranges["num"])
            fields["steps"] = _slider("Steps", self._ranges["steps"])
        fields["guidance_scale"] = _slider("Guidance scale", self._ranges["guidance_scale"])
        fields["negative_prompt"] = gr.Textbox(
            label="Negative prompt", info="what guidance leads away from; a student takes none", elem_id="negative"
        )
        with gr.Row(equal_height=True):
            fields["seed"] = gr.Number(
                secrets.randbelow(DRAWN_SEEDS),
                label="Seed",
                precision=0,
                minimum=OPTION_NUMBERS["seed"].least,
                min_width=140,
                scale=2,
                elem_id="seed",
            )
            self._dice = gr.Button("\N{DIE FACE-5} Dice", min_width=90, size="md", elem_id="dice")
            fields["draw"] = gr.Checkbox(True, label="New each time", min_width=130, elem_id="draw")
        with gr.Row(equal_height=True):
            fields["accelerator"] = gr.Dropdown(
                accelerators, value=accelerators[0], label="Acceleration", min_width=140, elem_id="accelerator"
            )
            fields["compare"] = gr.Checkbox(
                label="Compare", info="make it without acceleration too, and say what was saved", elem_id="compare"
            )

    def _ask_recording(self) -> None:
        fields = self._fields
        fields["file"] = gr.Audio(
            label="Recording",
            sources=["upload"],
            type="filepath",
            editable=False,
            buttons=[],
            waveform_options=gr.WaveformOptions(show_recording_waveform=False),
            elem_id="recording",
        )
        self._take_shown = gr.Button("Take the clip that is shown", size="sm", elem_id="take")
        self._wave = gr.HTML(
            None,
            html_template=_WAVEFORM,
            js_on_load=(_HERE / "waveform.js").read_text(encoding="utf-8"),
            elem_classes="drag",
            elem_id="wave",
        )
        with gr.Row():
            for name, label in (("mask_start_seconds", "Start (s)"), ("mask_length_seconds", "Length (s)")):
                least = OPTION_NUMBERS[name].least
                fields[name] = gr.Number(0, label=label, minimum=least, step=0.01, min_width=100, elem_id=name)
            fields["boundary_seconds"] = gr.Number(
                EditMask.boundary_seconds,
                label="Context (s)",
                minimum=OPTION_NUMBERS["boundary_seconds"].least,
                step=0.1,
                min_width=100,
            )
        fields["more_parts"] = gr.Textbox(
            label="More parts (s)", info="made anew beside that one: [[START, LENGTH], ...]", elem_id="more_parts"
        )
        self._edit = gr.Button("Make that part anew", variant="primary", elem_id="edit")
        fields["strength"] = _slider("Strength of a variation", strength_range())
        self._vary = gr.Button("Make a variation", variant="primary", elem_id="vary")

    def _has_student(self, model: str) -> bool:
        return f"{model}{STUDENT}" in self._service.engine.models

    # ---------------------------------------------------------------- what is shown

    def _show(self) -> None:
        with gr.Row():
            self._status = gr.HTML(_bar(Stage("Nothing made yet.", 0.0)), elem_id="status", padding=False, scale=5)
            self._cancel = gr.Button("Cancel", interactive=False, size="sm", elem_id="cancel", scale=0, min_width=110)
        self._player = gr.Audio(label="Sound", interactive=False, buttons=[], elem_id="player")
        self._picture = gr.Image(
            label="Spectrogram", show_label=False, interactive=False, buttons=["fullscreen"], elem_id="spectrogram"
        )
        self._words = gr.Markdown(elem_id="words")
        with gr.Row():
            self._wav = gr.DownloadButton("Download WAV", interactive=False, size="md", elem_id="wav")
            self._json = gr.DownloadButton("Download settings", interactive=False, size="md", elem_id="json")
        self._history = gr.Radio(
            [],
            label="History of this session",
            info="choose one to see it again",
            elem_classes="history",
            elem_id="history",
            interactive=True,
        )

    def _shown(self, session: Session, take: Take | None) -> dict[Any, Any]:
        """What the right side has of a take."""
        if take is None:
            return {}
        there = {kind: str(take.file(kind)) for kind in ("wav", "png", "json")}
        return {
            self._player: there["wav"],
            self._picture: there["png"],
            self._words: self._studio.say(session, take),
            self._wav: gr.update(value=there["wav"], interactive=True),
            self._json: gr.update(value=there["json"], interactive=True),
        }

    # ---------------------------------------------------------------- what happens

    def _connect(self) -> None:
        fields = self._fields
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        shown = [self._player, self._picture, self._words, self._wav, self._json]
        made = [*shown, self._session, self._status, self._cancel, self._history, fields["seed"]]
        for kind, button in (("generate", self._generate), ("edit", self._edit), ("vary", self._vary)):
            asked = {self._session, *self._asked(kind)}
            button.click(self._maker(kind), asked, made, **quiet)
            button.click(None, None, None, js=_TO_RESULT, **quiet)
        self._cancel.click(Session.cancel, self._session, None, **quiet)
        self._history.input(self._choose, [self._session, self._history], shown, **quiet)
        self._take_shown.click(self._take, [self._session, self._history], fields["file"], **quiet)
        self._dice.click(lambda: secrets.randbelow(DRAWN_SEEDS), None, fields["seed"], **quiet)
        span = [fields["mask_start_seconds"], fields["mask_length_seconds"]]
        fields["file"].change(self._look, fields["file"], [self._wave, *span], **quiet)
        self._wave.release(_dragged, None, span, **quiet)
        for number in span:
            number.change(None, [*span, self._wave], self._wave, js=_MOVE_SPAN, **quiet)
        limited = [fields[name] for name in self._ranges]
        choice = [fields["model"], fields["student"]]
        for field in choice:
            field.input(self._switch, choice, [fields["student"], fields["accelerator"], *limited], **quiet)
        fields["student"].input(
            lambda on: gr.update(interactive=not on), fields["student"], fields["negative_prompt"], **quiet
        )

    def _asked(self, kind: str) -> list[Any]:
        """The fields of a kind of request."""
        own = {
            "generate": ("duration_seconds",),
            "edit": ("file", "mask_start_seconds", "mask_length_seconds", "boundary_seconds", "more_parts"),
            "vary": ("file", "strength"),
        }
        every = {name for names in own.values() for name in names}
        return [field for name, field in self._fields.items() if name in own[kind] or name not in every]

    def _maker(self, kind: str) -> Any:
        async def make(given: MutableMapping[Any, Any]) -> AsyncIterator[dict[Any, Any]]:
            session = given[self._session]
            values = {name: given[field] for name, field in self._fields.items() if field in given}
            compare, draw, student = (values.pop(name) for name in ("compare", "draw", "student"))
            if draw:
                values["seed"] = secrets.randbelow(DRAWN_SEEDS)
            if student:
                values |= {"model": f"{values['model']}{STUDENT}", "negative_prompt": ""}
            yield {self._cancel: gr.update(interactive=True), self._fields["seed"]: values["seed"]}
            async for update in self._make(session, {"kind": kind, **values}, compare):
                yield update

        return make

    async def _make(self, session: Session, values: Mapping[str, Any], compare: bool) -> AsyncIterator[dict[Any, Any]]:
        stage = Stage("Nothing was made.", 0.0)
        try:
            if "file" in values and values["file"] is None:
                raise ValueError("file: give a recording, or take the clip that is shown")
            async for stage in self._studio.make(session, values, compare):
                yield {self._status: _bar(stage)}
        except ValueError as error:
            gr.Warning(html.escape(str(error)))
            stage = Stage(f"Not made: {error}", 0.0)
        chosen: dict[str, Any] = {} if stage.take is None else {"value": stage.take.folder.name}
        yield {
            self._session: session,  # whose time begins anew
            self._status: _bar(stage),
            self._cancel: gr.update(interactive=False),
            self._history: gr.update(choices=session.choices(), **chosen),
            **self._shown(session, stage.take),
        }

    def _choose(self, session: Session, folder: str | None) -> dict[Any, Any]:
        take = session.find(folder)
        if take is None:
            gr.Warning("that clip is kept no more")
        return self._shown(session, take)

    def _take(self, session: Session, folder: str | None) -> Any:
        take = session.find(folder)
        if take is None:
            gr.Warning("no clip is shown yet")
            return gr.skip()
        return str(take.file("wav"))

    def _look(self, path: str | None) -> tuple[Any, float, float]:
        """The waveform of a recording that was given, and a part of it to begin with."""
        try:
            wave = self._studio.waveform(path)
        except ValueError as error:
            gr.Warning(html.escape(str(error)))
            wave = None
        return (wave, wave["start"], wave["length"]) if wave else (None, 0.0, 0.0)

    def _switch(self, model: str, student: bool) -> list[Any]:
        """Limits and beginnings of another model."""
        there = self._has_student(model)
        name = f"{model}{STUDENT}" if student and there else model
        names = accelerator_names(self._service.engine.models[name])
        changed = [_update(span) for span in sliders(self._service, name).values()]
        return [gr.update(visible=there, value=student and there), gr.update(choices=names, value=names[0]), *changed]


def _slider(label: str, span: SliderRange) -> Any:
    return gr.Slider(span.least, span.most, span.value, step=span.step, label=label, min_width=140)


def _update(span: SliderRange) -> Any:
    return gr.update(minimum=span.least, maximum=span.most, value=span.value, step=span.step)


def _dragged(event: gr.EventData) -> tuple[float, float]:
    """Start and length of the span that was chosen on the waveform."""
    return round(float(event.start), 2), round(float(event.length), 2)


def _bar(stage: Stage) -> str:
    """Progress, and what there is to say of it."""
    words = html.escape(stage.words)
    bar = f'<progress max="1" value="{stage.share:.3f}" aria-label="progress"></progress>'
    return f'<div class="status" role="status">{bar}<span>{words}</span></div>'
