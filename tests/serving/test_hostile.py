"""Clients that mean harm, or are broken: each is told what is wrong, no answer is a 500, and the next one is served."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from fuzzing import ABSURD_VALUES, altered, bounded, damaged
from gated_generators import PATIENCE_SECONDS
from hypothesis import given
from hypothesis import strategies as st
from small_system import STEPS

from foley.generation.options import MAX_PROMPT_CHARACTERS
from foley.serving import server
from foley.serving.app import Access, create_app
from foley.serving.engine import Engine, Served
from foley.serving.jobs import KeptJobs
from foley.serving.server import DrainingServer
from foley.serving.service import Limits, Service

BODY = {"prompt": "a dog barks", "seed": 7, "steps": STEPS["num_steps"], "duration_seconds": STEPS["duration_seconds"]}
FULL_BODY = {**BODY, "negative_prompt": "", "num": 1, "model": "tiny", "guidance_scale": 2.0, "format": "wav"}
LIMITS = Limits(max_num=1, max_steps=4, max_upload_bytes=20_000, max_upload_seconds=2.0)
PATIENT_SECONDS = 2.0
NO_SOUND = "RIFF\x24\x08\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00".encode("latin-1")


@pytest.fixture(scope="module")
def service(generator):
    engine = Engine([{"tiny": Served(generator)}], batch_wait_seconds=0.0)
    yield Service(engine, LIMITS, KeptJobs(10, 1 << 20, 60.0))
    engine.close()


@pytest.fixture(scope="module")
def client(service):
    # An exception that no handler knows is raised here, and not answered by 500.
    return TestClient(create_app(service, Access(hosts=("testserver",))))


def post(client, content, path="/v1/audio/generate", kind="application/json"):
    """The answer, which is a sound, or a refusal in words that are shorter than what was sent."""
    answer = client.post(path, content=content, headers={"Content-Type": kind})
    if answer.status_code == 200:
        return answer
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    assert list(answer.json()) == ["detail"]
    assert 0 < len(answer.json()["detail"]) < 1000
    assert "Traceback" not in answer.text
    return answer


# ---------------------------------------------------------------- bodies


@bounded
@given(body=altered(FULL_BODY))
def test_an_altered_request_is_met_or_refused(client, body):
    post(client, json.dumps(body))


@bounded
@given(body=st.dictionaries(st.sampled_from([*FULL_BODY, "", "x", "é", "a" * 3000]), ABSURD_VALUES, max_size=4))
def test_an_absurd_request_is_refused(client, body):
    assert post(client, json.dumps(body)).status_code in (413, 422) or body.keys() <= FULL_BODY.keys()


def test_thousands_of_unknown_fields_are_refused_briefly(client):
    assert post(client, json.dumps({f"x{index}": 1 for index in range(1000)})).status_code == 422


@bounded
@given(content=damaged(json.dumps(FULL_BODY).encode()))
def test_damaged_json_is_met_or_refused(client, content):
    post(client, content)


@pytest.mark.parametrize("prompt", ["", "ü🐶", "a\0b", "\u202e\u200b", "\uff21", "\ufffe", "x" * MAX_PROMPT_CHARACTERS])
def test_any_text_is_a_prompt(client, prompt):
    assert post(client, json.dumps({**BODY, "prompt": prompt})).status_code == 200


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 400, "1" * 5000, "NaN", "Infinity", "1.5", "null", "[]"])
@pytest.mark.parametrize("name", ["seed", "num", "steps", "guidance_scale", "duration_seconds"])
def test_absurd_numbers_are_refused_by_name(client, name, number):
    content = json.dumps({**BODY, name: "HERE"}).replace('"HERE"', number)
    answer = post(client, content)
    takes = {"null": name != "num", "1.5": name in ("guidance_scale", "duration_seconds")}.get(number, False)
    assert answer.status_code == 200 if takes else answer.status_code in (400, 422)
    if answer.status_code == 422:
        assert name in answer.json()["detail"] or "JSON" in answer.json()["detail"]


# ---------------------------------------------------------------- uploads


def multipart(file, /, **fields):
    """A form with a file, as a browser sends it."""
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    if file is not None:
        parts.append(b'name="file"; filename="../../x.wav"\r\nContent-Type: audio/wav\r\n\r\n' + file)
    return b"".join(b"--edge\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--edge--\r\n"


FORM = {"prompt": "rain", "steps": 2}
KIND = "multipart/form-data; boundary=edge"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (multipart(b"", **FORM), "file: is empty"),
        (multipart(NO_SOUND, **FORM), "file: "),
        (multipart(None, **FORM), "file: Field required"),
        (multipart(b"x", prompt="rain", strength="NaN"), "strength: "),
        (multipart(b"x", prompt="rain", file="no file"), "file: "),
        (multipart(b"x", **FORM)[:-20], ""),
        (b"", ""),
        (b"--edge--\r\n", "prompt: Field required"),
        (multipart(b"x", **{f"name{index}": 1 for index in range(100)}), "Too many fields"),
        (multipart(b"x", prompt="x" * 70_000), f"larger than {LIMITS.max_upload_bytes} bytes"),
    ],
)
def test_forms_that_cannot_be_used_are_refused(client, content, reason):
    answer = post(client, content, "/v1/audio/variations", KIND)
    assert answer.status_code in (400, 413, 422)
    assert reason in answer.json()["detail"]


@bounded
@given(content=damaged(multipart(NO_SOUND, **FORM, strength=0.5)))
def test_a_damaged_form_is_refused(client, content):
    assert post(client, content, "/v1/audio/variations", KIND).status_code in (400, 422)


def test_a_form_of_another_kind_is_refused(client):
    for kind in ("multipart/form-data", "text/plain", "application/x-www-form-urlencoded", "application/json", "\x7f"):
        assert post(client, b"{}", "/v1/audio/edit", kind).status_code in (400, 422)


@pytest.mark.parametrize(
    "path", ["/v1/jobs/%00", "/v1/jobs/..%2f..%2fetc", "/v1/jobs/x/clips/nan", "/v1/jobs/x/clips/-1"]
)
def test_paths_that_there_are_not_are_refused(client, path):
    assert client.get(path).status_code in (404, 422)


def test_words_are_few_also_where_uploads_may_be_large(service):
    roomy = Service(service.engine, replace(LIMITS, max_upload_bytes=1 << 30), KeptJobs(10, 1 << 20, 60.0))
    client = TestClient(create_app(roomy, Access(hosts=("testserver",))))
    answer = post(client, b" " * (1 << 20) + b"{}")
    assert (answer.status_code, answer.json()["detail"]) == (413, "the request is larger than 1048576 bytes")
    large = multipart(bytes(1 << 20), **FORM)
    assert post(client, large, "/v1/audio/variations", KIND).status_code == 422  # it is no audio


# ---------------------------------------------------------------- connections


@pytest.fixture(scope="module")
def port(generator):
    """Of a server with a real socket, which waits PATIENT_SECONDS for a request, and as long for its body."""
    with listening(generator) as number:
        yield number


@contextmanager
def listening(generator, max_connections=None):
    engine = Engine([{"tiny": Served(generator)}], timeout_seconds=PATIENT_SECONDS, batch_wait_seconds=0.0)
    service = Service(engine, LIMITS, KeptJobs(10, 1 << 20, 60.0))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        number = bound.getsockname()[1]
    config = server.server_config(create_app(service), "127.0.0.1", number, max_connections=max_connections)
    running = DrainingServer(config, service, 1.0)
    thread = threading.Thread(target=running.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_HEAD_SECONDS", PATIENT_SECONDS)
        thread.start()
        until = time.monotonic() + PATIENCE_SECONDS
        while not running.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield number
    running.should_exit = True
    thread.join(PATIENCE_SECONDS)


def sent(port, *parts):
    """What is answered to bytes, until the server closes the connection, and after how many seconds it does."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection:
        start = time.monotonic()
        for part in parts:
            connection.sendall(part)
        answer = b""
        while found := connection.recv(1 << 16):
            answer += found
        return answer, time.monotonic() - start


def head(length, path="/v1/audio/generate", kind="application/json"):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Connection: close", "\r\n"]).encode()


CONTENT = json.dumps(BODY).encode()


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((head(len(CONTENT)), CONTENT), 200),
        ((b"GARBAGE\r\n\r\n",), 400),
        ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20) + b"\r\n\r\n",), 400),  # TLS
        ((head("-1"),), 400),
        ((head("many"),), 400),
        ((head(10**12),), 413),
        ((head(1), CONTENT), 422),  # says that it is shorter than it is
        ((head(len(CONTENT) + 1), CONTENT), 408),  # longer
        ((head(0),), 422),
        ((head(500, "/v1/audio/variations", KIND), multipart(NO_SOUND, **FORM)[:100]), 408),
        ((head(100, "/nothing"), b"x" * 100), 404),
    ],
)
def test_what_comes_by_a_socket_is_answered_by(port, parts, status):
    answer, _ = sent(port, *parts)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"Traceback" not in answer


def test_a_chunked_body_is_bounded_too(port):
    lines = [
        "POST /v1/audio/generate HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Connection: close",
    ]
    start = "\r\n".join([*lines, "Transfer-Encoding: chunked", "\r\n"]).encode()
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert sent(port, start, chunk, chunk, b"0\r\n\r\n")[0].startswith(b"HTTP/1.1 413 ")


def test_more_connections_than_there_may_be_are_sent_away_and_some_day_there_is_room_again(generator):
    with listening(generator, max_connections=3) as port:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS))
            assert sent(port, head(len(CONTENT)), CONTENT)[0].startswith(b"HTTP/1.1 503 ")
        until = time.monotonic() + PATIENCE_SECONDS
        while not (answer := sent(port, head(len(CONTENT)), CONTENT)[0]).startswith(b"HTTP/1.1 200 "):
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert time.monotonic() < until


def test_who_sends_nothing_is_sent_away_and_keeps_nobody_waiting(port):
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS))
            for _ in range(30)
        ]
        for index, connection in enumerate(slow):
            connection.sendall((b"", b"POST /v1/audio/gen", head(1000)[:-2])[index % 3])
        assert sent(port, head(len(CONTENT)), CONTENT)[0].startswith(b"HTTP/1.1 200 ")
        assert [connection.recv(1) for connection in slow] == [b""] * len(slow)


@pytest.mark.slow
def test_a_hundred_at_once_are_served_or_told_to_come_again(port):
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: sent(port, head(len(CONTENT)), CONTENT)[0][:12], range(100)))
    assert set(answers) <= {b"HTTP/1.1 200", b"HTTP/1.1 429", b"HTTP/1.1 504"}
    assert answers.count(b"HTTP/1.1 200") >= 1
    assert sent(port, head(len(CONTENT)), CONTENT)[0].startswith(b"HTTP/1.1 200 ")
