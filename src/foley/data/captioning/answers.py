"""What a chat endpoint answers: text, or one of three kinds of failure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import requests


class EndpointError(RuntimeError):
    """Nothing can be asked of the endpoint: no key, a wrong one, no money, no such model."""


class AnswerError(RuntimeError):
    """No usable answer to this one request."""


class TemporaryError(RuntimeError):
    """Worth another try; `wait_seconds` is what the server asks for."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Answer:
    """Text, and the tokens that were paid for (0 where the server does not count)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_answer(response: requests.Response) -> Answer:
    """The answer in a response; raises TemporaryError where it is none, AnswerError where it is empty or cut."""
    try:
        content = response.json()
        choice = content["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = content.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TemporaryError(f"the answer is not a chat completion ({type(error).__name__}: {error})") from error
    if not isinstance(text, str) or not text.strip():
        raise AnswerError(f"the answer is empty (finish_reason {finish!r})")
    if finish == "length":
        raise AnswerError("the answer was cut at its greatest number of tokens")
    return Answer(text, *tokens)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now; the header gives seconds or a date."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
