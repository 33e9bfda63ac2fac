"""The HTTP API: what is answered, what is refused, and that the line stays live after whatever was asked."""

import asyncio
import base64
import io
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from fastapi import UploadFile
from fastapi.testclient import TestClient
from gated_generators import PATIENCE_SECONDS, Held
from small_system import STEPS

from foley.core.numbers import NumberRange
from foley.data.audio import FORMATS
from foley.generation.editing import EditMask
from foley.generation.options import MAX_PROMPT_CHARACTERS, OPTION_NUMBERS
from foley.generation.settings import GenerationSettings
from foley.serving.app import Access, create_app
from foley.serving.engine import Engine, Served
from foley.serving.jobs import DEFAULT_ACCELERATOR, KeptJobs
from foley.serving.schema import EditForm, GenerateBody, VariationForm
from foley.serving.service import Limits, Service
from foley.serving.sounds import MEDIA_TYPES

BODY = {"prompt": "a dog barks", "seed": 7, "steps": STEPS["num_steps"], "duration_seconds": STEPS["duration_seconds"]}
LIMITS = Limits(max_num=3, max_steps=20, max_upload_bytes=20_000, max_upload_seconds=2.0)
ANYONE = Access(hosts=("testserver",))


@pytest.fixture
def serve(start, generator):
    """Makes clients of a server; `service` is theirs."""

    def make(served=generator, access=ANYONE, accelerators=None, **options):
        engine = start(served, accelerators, **options)
        service = Service(engine, LIMITS, KeptJobs(10, 1 << 20, 60.0))
        client = TestClient(create_app(service, access))
        client.service = service
        return client

    return make


@pytest.fixture(scope="module")
def client(generator):
    """Of one server for all tests that leave it as it was."""
    service = Service(Engine([{"tiny": Served(generator)}]), LIMITS, KeptJobs(10, 1 << 20, 60.0))
    client = TestClient(create_app(service, ANYONE))
    client.service = service
    yield client
    service.engine.close()


def recording(seconds=0.5, kind="WAV"):
    """A file of a quiet tone at the system's own rate, and its samples."""
    samples = 0.1 * torch.sin(torch.arange(round(seconds * 2000)) / 5)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.numpy(), 2000, format=kind)
    return buffer.getvalue(), soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")[0]


def upload(content=None):
    return {"file": ("../../etc/passwd", recording()[0] if content is None else content)}


def edit_form(**changes):
    mask = {"mask_start_seconds": 0.2, "mask_length_seconds": 0.1, "boundary_seconds": 0.2}
    return {"prompt": "rain", "steps": 2, "seed": 3, **mask, **changes}


# ---------------------------------------------------------------- sounds


def test_a_wav_is_byte_by_byte_the_file_that_the_command_line_writes(client, generator, tmp_path):
    answer = client.post("/v1/audio/generate", json=BODY)
    assert answer.status_code == 200, answer.text
    stem = generator.generate(["a dog barks"], seeds=[7], **STEPS).write_clip(tmp_path, 0, 0)
    assert answer.content == (tmp_path / f"{stem}.wav").read_bytes()
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["content-disposition"] == 'attachment; filename="foley_7.wav"'
    assert (answer.headers["x-foley-seed"], answer.headers["x-foley-model"]) == ("7", generator.model_hash)


@pytest.mark.parametrize("name", MEDIA_TYPES)
def test_every_format_is_read_back_as_long_as_it_was_asked_for(client, name):
    answer = client.post("/v1/audio/generate", json={**BODY, "format": name})
    assert answer.headers["content-type"] == MEDIA_TYPES[name]
    info = soundfile.info(io.BytesIO(answer.content))
    assert info.format == FORMATS[name][0]
    assert info.duration == pytest.approx(STEPS["duration_seconds"], abs=0.15)  # MP3 pads


def test_several_clips_come_as_json_with_what_their_files_would_say(client, generator):
    answer = client.post("/v1/audio/generate", json={**BODY, "num": 2}).json()
    assert [clip["seed"] for clip in answer["clips"]] == [7, 8]
    facts = answer["clips"][1]["facts"]
    assert (facts["prompt"], facts["seed"], facts["settings"]["model_hash"]) == ("a dog barks", 8, generator.model_hash)
    for clip in answer["clips"]:
        assert soundfile.info(io.BytesIO(base64.b64decode(clip["audio_base64"]))).frames == 1000
    alone = client.post("/v1/audio/generate", json=BODY, headers={"Accept": "application/json"}).json()
    assert alone["clips"][0]["audio_base64"] == answer["clips"][0]["audio_base64"]


def test_a_seed_that_is_not_given_is_drawn_and_said(client):
    body = {name: value for name, value in BODY.items() if name != "seed"}
    seeds = {client.post("/v1/audio/generate", json=body).headers["x-foley-seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_what_changes_nothing_is_said(client):
    answer = client.post("/v1/audio/generate", json={**BODY, "guidance_scale": 1, "negative_prompt": "thunder"})
    assert answer.headers["x-foley-warnings"] == "negative_prompt has no effect at guidance scale 1"


def test_an_edit_keeps_what_is_outside_the_mask_and_is_that_of_the_command_line(client, generator, tmp_path):
    content, samples = recording()
    answer = client.post("/v1/audio/edit", data=edit_form(), files=upload(content))
    assert answer.status_code == 200, answer.text
    edited = soundfile.read(io.BytesIO(answer.content), dtype="float32")[0]
    kept = [*range(400), *range(600, 1000)]
    assert (edited[kept] == samples[kept]).all()
    assert (edited[400:600] != samples[400:600]).any()
    (tmp_path / "tone.wav").write_bytes(content)
    own = generator.edit(["rain"], tmp_path / "tone.wav", EditMask(0.2, 0.1, 0.2), seeds=[3], num_steps=2)
    assert answer.content == (tmp_path / f"{own.write_clip(tmp_path, 0, 0)}.wav").read_bytes()


def test_a_variation_has_the_length_of_its_recording_and_no_path_of_the_server(client):
    form = {"prompt": "rain", "steps": 4, "strength": 0.5}
    answer = client.post("/v1/audio/variations", data=form, files=upload(), headers={"Accept": "application/json"})
    facts = answer.json()["clips"][0]["facts"]
    assert facts["settings"]["init"]["file"] == "upload"
    assert facts["settings"]["duration_seconds"] == 0.5
    assert "foley-upload-" not in answer.text


def test_uploads_are_gone_when_their_jobs_have_ended(client, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert client.post("/v1/audio/edit", data=edit_form(), files=upload()).status_code == 200
    assert client.post("/v1/audio/edit", data=edit_form(), files=upload(b"no audio")).status_code == 422
    assert client.post("/v1/audio/edit", data=edit_form(model="other"), files=upload()).status_code == 422
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- jobs


def events(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_a_job_tells_how_far_it_is_and_keeps_its_sounds(serve):
    held = Held(at=2)
    client = serve(accelerators={DEFAULT_ACCELERATOR: held})
    begun = client.post("/v1/jobs", json={**BODY, "num": 2, "format": "flac"})
    assert begun.status_code == 202
    job = begun.json()
    place = f"/v1/jobs/{job['id']}"
    assert held.reached.wait(PATIENCE_SECONDS)
    now = client.get(place).json()
    assert (now["state"], now["progress"], now["clips"], now["seeds"]) == ("running", 0.5, [], [7, 8])
    assert client.get(f"{place}/clips/0").status_code == 409
    held.gate.set()
    stream = client.get(f"{place}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    last = events(stream.text)[-1]
    assert (last["state"], last["progress"], last["clips"]) == ("done", 1.0, [f"{place}/clips/0", f"{place}/clips/1"])
    assert not client.service.is_drained(since=0.0)
    for clip in last["clips"]:
        assert soundfile.info(io.BytesIO(client.get(clip).content)).format == "FLAC"
    assert client.service.is_drained(since=0.0)
    assert client.get(f"{place}/clips/2").status_code == 404
    assert client.delete(place).status_code == 200
    assert client.get(place).status_code == 404


def test_a_job_is_cancelled_by_delete(serve, gated):
    client = serve(gated)
    first = client.post("/v1/jobs", json=BODY).json()
    assert gated.reached.wait(PATIENCE_SECONDS)
    waiting = client.post("/v1/jobs/variations", data={"prompt": "rain", "steps": 2}, files=upload()).json()
    assert client.get(f"/v1/jobs/{waiting['id']}").json()["position"] == 0
    for job in (waiting, first):
        ended = client.delete(f"/v1/jobs/{job['id']}").json()
        assert (ended["state"], ended["error"]["status"]) == ("cancelled", 409)
    assert client.service.engine.num_waiting == 0
    gated.gate.set()
    assert client.post("/v1/audio/generate", json=BODY).status_code == 200


def test_a_job_that_fails_says_so_and_no_more_than_that(serve, gated):
    gated.gate.set()
    client = serve(gated)
    job = client.post("/v1/jobs", json={**BODY, "prompt": "bad"}).json()
    failed = events(client.get(f"/v1/jobs/{job['id']}/events").text)[-1]
    assert failed["error"] == {"status": 500, "detail": "the generation failed; the log of the server says why"}
    assert client.get(f"/v1/jobs/{job['id']}/clips/0").status_code == 500
    assert client.post("/v1/audio/generate", json=BODY).status_code == 200


def test_an_unknown_job_is_404(client):
    for answer in (client.get("/v1/jobs/x"), client.get("/v1/jobs/x/events"), client.delete("/v1/jobs/x")):
        assert (answer.status_code, answer.json()["detail"]) == (404, "there is no such job, or no more")


# ---------------------------------------------------------------- refusals

MOST = MAX_PROMPT_CHARACTERS
REFUSED = {
    "too long": ({"duration_seconds": 6}, "duration_seconds=6.0: give a number <= 5.0"),
    "no length": ({"duration_seconds": 0}, "duration_seconds: Input should be greater than or equal to 0.0001"),
    "too many clips": ({"num": 4}, "num=4: give a whole number <= 3"),
    "no clips": ({"num": 0}, "num: Input should be greater than or equal to 1"),
    "too many steps": ({"steps": 21}, "steps=21: give a whole number <= 20"),
    "a truth": ({"steps": True}, "steps: Value error, give a number"),
    "another type": ({"steps": "many"}, "steps: Input should be a valid integer"),
    "a long prompt": ({"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, f"prompt: String should have at most {MOST}"),
    "an unknown field": ({"_target_": "os.system"}, "_target_: Extra inputs are not permitted"),
    "a path for a model": ({"model": "/etc"}, "model must be one of tiny, got '/etc'"),
    "a path for an accelerator": ({"accelerator": "../x"}, "accelerator must be one of default, got '../x'"),
    "a solver of others": ({"solver": "euler_flow"}, "cannot sample a model that predicts 'v'"),
    "an unknown solver": ({"solver": "magic"}, "solver: Input should be 'ddim'"),
    "an unknown format": ({"format": "exe"}, "format: Input should be 'wav'"),
    "a seed below zero": ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    "a seed whose last clip has none": ({"seed": 2**63 - 1, "num": 2}, "seed=9223372036854775808: give a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_requests_are_refused_with_the_reason(client, case):
    changes, reason = REFUSED[case]
    answer = client.post("/v1/audio/generate", json={**BODY, **changes})
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert len(answer.text) < 1000  # what was sent is not sent back
    assert client.service.engine.is_idle


@pytest.mark.parametrize("content", ["{", '{"prompt": "\\ud800"}', '{"prompt": "a", "eta": NaN}', "[]", "[" * 5000])
def test_what_is_no_request_is_refused(client, content):
    answer = client.post("/v1/audio/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert list(answer.json()) == ["detail"]


UPLOADS = {
    "no audio": (b"no audio at all", "file: cannot be decoded"),
    "nothing": (b"", "file: is empty"),
    "too long": (recording(2.5, "OGG")[0], "the recording lasts 2.5 s; give one of at most 2 s"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_uploads_that_cannot_be_used_are_refused(client, case):
    content, reason = UPLOADS[case]
    answer = client.post("/v1/audio/variations", data={"prompt": "rain"}, files=upload(content))
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert "foley-upload-" not in answer.text


def test_a_mask_beyond_the_recording_is_refused_when_its_turn_comes(client):
    answer = client.post("/v1/audio/edit", data=edit_form(mask_start_seconds=0.9), files=upload())
    assert answer.status_code == 422
    assert "mask_start_seconds=0.9 lies outside upload, which lasts 0.5 s" in answer.json()["detail"]


def test_several_masks_are_a_field_of_json(client):
    form = {"prompt": "rain", "steps": 2, "seed": 3, "boundary_seconds": 0.1, "masks": "[[0.1, 0.1], [0.3, 0.05]]"}
    content, samples = recording()
    answer = client.post("/v1/audio/edit", data=form, files=upload(content))
    assert answer.status_code == 200, answer.text
    edited, _ = soundfile.read(io.BytesIO(answer.content), dtype="float32")
    changed = np.flatnonzero(edited != samples)
    assert set(changed) <= {*range(200, 400), *range(600, 700)}
    assert changed.min() < 400 < 600 <= changed.max()
    for masks, reason in (
        ("[0.1, 0.2]", "give one pair of seconds for each part"),
        ("[[", "masks is damaged or not JSON"),
    ):
        refused = client.post("/v1/audio/edit", data={**form, "masks": masks}, files=upload(content))
        assert refused.status_code == 422
        assert reason in refused.json()["detail"]
    for other in (edit_form(masks="[[0.1, 0.1]]"), {"prompt": "rain"}):
        refused = client.post("/v1/audio/edit", data=other, files=upload(content))
        assert (refused.status_code, "or masks in the place of both" in refused.json()["detail"]) == (422, True)


@pytest.mark.parametrize("path", ["/v1/audio/edit", "/v1/jobs/edit"])
def test_what_is_too_large_is_refused_before_it_is_read(client, path):
    large = recording(LIMITS.max_upload_bytes / 2000)[0]
    assert client.post(path, data=edit_form(), files=upload(large)).status_code == 413


def test_a_full_line_is_429_and_says_when_to_come_again(serve, gated):
    client = serve(gated, queue_size=1)
    for _ in range(2):
        assert client.post("/v1/jobs", json=BODY).status_code == 202
        assert gated.reached.wait(PATIENCE_SECONDS)
    refused = client.post("/v1/audio/generate", json=BODY)
    assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (429, True)
    gated.gate.set()
    assert 'foley_refused_total{status="429"} 1.0' in client.get("/metrics").text


def test_a_request_that_takes_too_long_is_504(serve, generator):
    held = Held(at=1)
    client = serve(accelerators={DEFAULT_ACCELERATOR: held}, timeout_seconds=0.3)
    held.gate.clear()
    answer = client.post("/v1/audio/generate", json=BODY)
    assert (answer.status_code, answer.json()["detail"]) == (504, "not finished within 0.3 s")
    held.gate.set()


def test_a_client_that_goes_away_frees_its_place(serve, gated):
    client = serve(gated, queue_size=1)
    client.post("/v1/jobs", json=BODY)
    assert gated.reached.wait(PATIENCE_SECONDS)
    messages, sent = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}], []

    async def receive():
        if messages:
            return messages.pop()
        while not client.service.engine.num_waiting:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": "/v1/audio/generate", "raw_path": b"/v1/audio/generate", "query_string": b"", "root_path": ""},
        "headers": [(b"host", b"testserver"), (b"content-type", b"application/json")],
        **{"client": ("127.0.0.1", 1), "server": ("testserver", 80)},
    }
    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert client.service.engine.num_waiting == 0
    assert client.post("/v1/jobs", json=BODY).status_code == 202  # in the place that is free again
    gated.gate.set()


# ---------------------------------------------------------------- who may


def test_a_key_is_asked_for_where_there_is_one(serve):
    client = serve(access=Access(api_key="s3cret", hosts=("testserver",)))
    for headers in ({}, {"Authorization": "Bearer s3cre"}, {"X-API-Key": b"\xe9"}, {"Authorization": "Basic s3cret"}):
        for answer in (client.get("/v1/models", headers=headers), client.get("/metrics", headers=headers)):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert client.get("/v1/models", headers={"X-API-Key": "s3cret"}).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_pages_elsewhere_and_other_names_are_refused(serve, client):
    elsewhere = {"Origin": "https://example.org"}
    assert client.post("/v1/jobs", json=BODY, headers=elsewhere).status_code == 403
    assert client.post("/v1/jobs", json=BODY, headers={"Origin": "http://["}).status_code == 403  # it is no address
    own = client.get("/v1/models", headers={"Origin": "http://testserver"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
    friendly = serve(access=Access(hosts=("testserver",), origins=("https://example.org",)))
    answer = friendly.get("/v1/models", headers=elsewhere)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://example.org")


# ---------------------------------------------------------------- about the server


def test_models_health_and_metrics(serve):
    client = serve()
    (model,) = client.get("/v1/models").json()
    assert (model["name"], model["sample_rate_hz"], model["max_duration_seconds"]) == ("tiny", 2000, 5.0)
    assert (model["accelerators"], model["max_num"], model["formats"]) == (
        [DEFAULT_ACCELERATOR, "mean"],
        3,
        list(MEDIA_TYPES),
    )
    client.post("/v1/audio/generate", json={**BODY, "num": 2})
    shown = client.get("/metrics").text
    assert 'foley_jobs_total{outcome="done"} 1.0' in shown
    assert "foley_audio_seconds_total 1.0" in shown
    assert 'foley_batch_clips_bucket{le="2.0"} 1.0' in shown
    assert client.get("/healthz").json() == {"status": "ok", "waiting": 0, "running": 0}
    client.service.engine.stop_accepting()
    health = client.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    drained = client.post("/v1/audio/generate", json=BODY)
    assert (drained.status_code, drained.headers["retry-after"]) == (503, "10")


def test_the_end_of_the_application_is_that_of_the_engine(serve):
    client = serve()
    with client:
        assert client.get("/docs").status_code == 200
    assert not client.service.engine.is_alive


# ---------------------------------------------------------------- one definition of limits


BODIES = (GenerateBody, EditForm, VariationForm)
VALUES = [-1, -1e-9, 0, 1e-5, 0.5, 1, 1.5, 3, 100_001, 10**6, 10**7, 2**63 - 1, 2**63, math.nan, math.inf, True]


def accepts(body, name, value):
    try:
        body.__pydantic_validator__.validate_assignment(body.model_construct(), name, value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("body", BODIES)
def test_limits_are_those_of_the_command_line(body):
    names = [name for name in body.model_fields if name in OPTION_NUMBERS]
    assert {"seed", "num", "steps", "eta", "guidance_scale", "guidance_rescale"} <= set(names)
    for name in names:
        for value in VALUES:
            assert accepts(body, name, value) == (value in OPTION_NUMBERS[name]), (name, value)


def test_a_loudness_is_of_the_request_or_of_the_server_and_never_of_an_edit():
    asked, server = GenerateBody(prompt="rain", loudness_lufs=-30.0), GenerationSettings(loudness_lufs=-23.0)
    assert asked.settings(server).loudness_lufs == -30.0
    assert GenerateBody(prompt="rain").settings(server).loudness_lufs == -23.0
    edit = {"prompt": "rain", "file": UploadFile(io.BytesIO()), "mask_start_seconds": 0.0, "mask_length_seconds": 1.0}
    assert EditForm(**edit).settings(server).loudness_lufs is None
    with pytest.raises(ValueError, match="loudness_lufs=-30 and edit exclude each other"):
        EditForm(**edit, loudness_lufs=-30.0).settings(server)


def test_the_openapi_page_shows_them(client):
    shown = client.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"]
    steps: NumberRange = OPTION_NUMBERS["steps"]
    number = next(kind for kind in shown["steps"]["anyOf"] if kind["type"] == "integer")
    assert (number["minimum"], number["maximum"]) == (steps.least, steps.most)
    assert shown["prompt"]["maxLength"] == MAX_PROMPT_CHARACTERS
