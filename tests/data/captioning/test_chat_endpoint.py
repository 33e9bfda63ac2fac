"""The chat protocol against a real server: answers, errors, time-outs, rate limits, and the key."""

import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from chat_server import completion

from foley.data.captioning.answers import Answer, AnswerError, EndpointError, retry_after
from foley.data.captioning.endpoint import ChatEndpoint, RateLimiter

KEY = "sk-not-for-your-eyes"


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)

    def build(**options) -> ChatEndpoint:
        settings = {"api_key_env": "TEST_KEY", "backoff_seconds": 0.01, "timeout_seconds": 0.3, "max_attempts": 3}
        built = ChatEndpoint(server.url + "/", "tiny", {"max_tokens": 5}, **{**settings, **options})
        built.start()
        return built

    return build


def test_a_request_and_its_answer(server, endpoint):
    assert endpoint().ask("Be brief.", "A dog.") == Answer("heard: A dog.", 50, 9)
    (request,) = server.requests
    assert request == {
        "path": "/v1/chat/completions",
        "model": "tiny",
        "max_tokens": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A dog."}],
    }
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, {"error": {"code": "rate_limit_exceeded"}}),
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, {"choices": []}),
        (200, {}, ["no object"]),
        0.6,
    ],
)
def test_passing_trouble_is_tried_again(trouble, server, endpoint):
    server.script = [trouble, trouble]
    assert endpoint().ask("", "rain").text == "heard: rain"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ((500, {}, b"oops"), r"no answer after 3 tries; the last: .* answers 500: oops"),
        (0.6, "no answer after 3 tries; the last: ReadTimeout"),
        ((200, {}, b"<html>"), "the last: the answer is not a chat completion"),
    ],
)
def test_lasting_trouble_is_the_requests_fault(trouble, message, server, endpoint):
    server.script = [trouble] * 3
    with pytest.raises(AnswerError, match=message):
        endpoint().ask("", "rain")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {}, {"error": "too long"}), "answers 400"),
        ((200, {}, completion(None, "content_filter")), "empty .*content_filter"),
        ((200, {}, completion("A dog barks and", "length")), "cut at its greatest number"),
    ],
)
def test_refusals_are_not_repeated(answer, message, server, endpoint):
    server.script = [answer]
    with pytest.raises(AnswerError, match=message):
        endpoint().ask("", "rain")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (401, {}, {"error": f"Incorrect API key provided: {KEY}"}),
        (404, {}, {"error": "no such model"}),
        (302, {"Location": "http://127.0.0.1:9/"}, b""),
        (429, {}, {"error": {"code": "insufficient_quota"}}),
    ],
)
def test_what_ends_the_run(answer, server, endpoint):
    server.script = [answer]
    with pytest.raises(EndpointError, match=f"answers {answer[0]}"):
        endpoint().ask("", "rain")
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment_and_is_never_shown(server, endpoint, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    built = endpoint()
    server.script = [(401, {}, {"error": f"wrong key {KEY}"})]
    with pytest.raises(EndpointError) as raised:
        built.ask("", "rain")
    seen = f"{raised.value} {raised.value!r} {vars(built)} {caplog.text}"
    assert KEY not in seen
    assert "<key>" in seen
    monkeypatch.setenv("TEST_KEY", " ")
    with pytest.raises(EndpointError, match="put it into the environment as TEST_KEY"):
        built.start()
    without = endpoint(api_key_env=None)
    without.ask("", "rain")
    assert server.keys[-1] is None


def test_nobody_listens():
    endpoint = ChatEndpoint("http://127.0.0.1:9/v1", "tiny", api_key_env=None, backoff_seconds=0.01, max_attempts=2)
    with pytest.raises(AnswerError, match="no answer after 2 tries; the last: ConnectionError"):
        endpoint.ask("", "rain")


def testretry_after_holds_back_all_requests_and_may_be_too_long(server, endpoint):
    server.script = [(429, {"Retry-After": "0.3"}, b"")]
    built = endpoint()
    start = time.monotonic()
    built.ask("", "rain")
    assert time.monotonic() - start >= 0.3
    server.script = [(429, {"Retry-After": "3600"}, b"")]
    with pytest.raises(AnswerError, match="asks to wait 3600 s"):
        built.ask("", "rain")


def testretry_after_in_both_forms():
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60))
    assert 57 < (retry_after({"Retry-After": in_a_minute}) or 0) <= 60
    assert retry_after({"Retry-After": "1.5"}) == 1.5
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({}) is None


def test_the_rate_is_kept():
    now, starts = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    limiter = RateLimiter(30, clock=lambda: now[0], sleep=sleep)
    for _ in range(4):
        limiter.wait()
        starts.append(now[0])
    assert starts == [0.0, 2.0, 4.0, 6.0]
    limiter.pause(10.0)
    limiter.wait()
    assert now[0] == 16.0
    with pytest.raises(ValueError, match="positive"):
        RateLimiter(0)
