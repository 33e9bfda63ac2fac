"""Chat completions of any server that speaks OpenAI's protocol, and what a run will cost before it is paid for.

Retries, time-outs, a steady rate and the pauses that a server asks for are shared by the threads of a process. No key
is ever shown.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import requests
from requests.auth import AuthBase

from foley.core.logs import get_logger
from foley.core.seeding import numpy_generator
from foley.data.captioning.answers import Answer, AnswerError, EndpointError, TemporaryError, read_answer, retry_after

_REFUSED_REQUEST = (400, 413, 422)
_TEMPORARY = (408, 409, 425, 429)
_OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached")
_SHOWN_CHARACTERS = 200
_CHARACTERS_PER_TOKEN = 4.0  # of English, roughly: an estimate of cost needs no tokenizer
_TOKENS_PER_MESSAGE = 4
_PER_MILLION = 1e6

_log = get_logger(__name__)


class RateLimiter:
    """Spaces out requests evenly; `pause` holds back all of them.

    Args:
        per_minute: requests; None for as many as there are.
    """

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if per_minute is not None and per_minute <= 0:
            raise ValueError(f"requests per minute must be positive, got {per_minute}")
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = clock()
        self._lock = Lock()

    def wait(self) -> None:
        """Return when the next request may start."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            self._sleep(start - now)

    def pause(self, seconds: float) -> None:
        """Let no request start in the next `seconds`."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


@dataclass(frozen=True)
class _Bearer(AuthBase):
    """Sets the header itself, so that no .netrc replaces the key, and keeps it out of `repr`."""

    key: str | None = field(repr=False)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class ChatEndpoint:
    """`POST <base_url>/chat/completions`.

    Waits between tries double from `backoff_seconds`, with jitter, or are what `Retry-After` says; they hold back the
    other threads too. The key is read from the environment when `start` is called and is in no message and no file.

    Args:
        base_url: such as https://api.openai.com/v1.
        options: the rest of the request, such as temperature and max_tokens.
        api_key_env: name of the variable that holds the key; None for a server that wants none.
        timeout_seconds: without a byte from the server.
        max_attempts: tries of one request.
        max_wait_seconds: a server that asks for more is not waited for.
        requests_per_minute: of all ranks together; None for no limit.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        options: Mapping[str, Any] | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        timeout_seconds: float = 60.0,
        max_attempts: int = 6,
        backoff_seconds: float = 1.0,
        max_wait_seconds: float = 120.0,
        requests_per_minute: float | None = None,
    ) -> None:
        self.model = model
        self.options = dict(options or {})
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self._api_key_env = api_key_env
        self._timeout_seconds = timeout_seconds
        self._max_attempts = max_attempts
        self._backoff_seconds, self._max_wait_seconds = backoff_seconds, max_wait_seconds
        self._requests_per_minute = requests_per_minute
        self._limiter = RateLimiter(requests_per_minute)
        self._auth = _Bearer(None)
        self._session = requests.Session()

    def start(self, world_size: int = 1) -> None:
        """Take the key from the environment, and this rank's share of the rate; raises EndpointError without a key."""
        if self._api_key_env:
            key = os.environ.get(self._api_key_env, "").strip()
            if not key:
                raise EndpointError(f"{self.url} wants a key: put it into the environment as {self._api_key_env}")
            self._auth = _Bearer(key)
        if self._requests_per_minute:
            self._limiter = RateLimiter(self._requests_per_minute / world_size)

    def ask(self, system: str, user: str) -> Answer:
        """The model's answer to `user` under the instruction `system`.

        Raises:
            AnswerError: none after all tries, an empty or a cut one, or the request was refused.
            EndpointError: the next request would fare no better.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, **self.options}
        for attempt in range(self._max_attempts):
            self._limiter.wait()
            try:
                return self._ask_once(body)
            except TemporaryError as error:
                last = error
                wait_seconds = self._wait_seconds(error, attempt, user)
            if wait_seconds > self._max_wait_seconds:
                raise AnswerError(f"{last}; the server asks to wait {wait_seconds:.0f} s")
            self._limiter.pause(wait_seconds)
        raise AnswerError(f"no answer after {self._max_attempts} tries; the last: {last}")

    def _wait_seconds(self, error: TemporaryError, attempt: int, user: str) -> float:
        if error.wait_seconds is not None:
            return error.wait_seconds
        longest = min(self._backoff_seconds * 2**attempt, self._max_wait_seconds)
        return longest * float(numpy_generator("backoff", user, attempt).uniform(0.5, 1.0))

    def _ask_once(self, body: Mapping[str, Any]) -> Answer:
        try:
            response = self._session.post(
                self.url, json=body, auth=self._auth, timeout=self._timeout_seconds, allow_redirects=False
            )
        except requests.RequestException as error:
            raise TemporaryError(self._clean(f"{type(error).__name__}: {error}")) from None
        if response.status_code != requests.codes.ok:
            self._refuse(response)
        return read_answer(response)

    def _refuse(self, response: requests.Response) -> None:
        status = response.status_code
        message = self._clean(f"{self.url} answers {status}: {response.text[:_SHOWN_CHARACTERS]}")
        if any(code in response.text for code in _OUT_OF_MONEY):
            raise EndpointError(message)
        if status in _TEMPORARY or status >= 500:
            raise TemporaryError(message, retry_after(response.headers))
        raise AnswerError(message) if status in _REFUSED_REQUEST else EndpointError(message)

    def _clean(self, text: str) -> str:
        """Servers quote keys in their errors."""
        one_line = " ".join(text.split())
        return one_line.replace(self._auth.key, "<key>") if self._auth.key else one_line


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt_usd_per_million: float
    completion_usd_per_million: float

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Of so many tokens."""
        prompt = prompt_tokens * self.prompt_usd_per_million
        return (prompt + completion_tokens * self.completion_usd_per_million) / _PER_MILLION


@dataclass(frozen=True)
class CostEstimate:
    """Of `requests` requests."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


def estimate_cost(system: str, users: Iterable[str], completion_tokens: float, prices: Prices) -> CostEstimate:
    """For one request per text in `users`: four characters a token, which is near for English, and no retries.

    Args:
        completion_tokens: expected in one answer.
    """
    requests, prompt_tokens = 0, 0.0
    for user in users:
        requests += 1
        prompt_tokens += (len(system) + len(user)) / _CHARACTERS_PER_TOKEN + 2 * _TOKENS_PER_MESSAGE
    answers = requests * completion_tokens
    return CostEstimate(requests, round(prompt_tokens), round(answers), prices.cost_usd(prompt_tokens, answers))
