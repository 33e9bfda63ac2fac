"""What the fuzzers share: how long they run, how they damage things, and what they accept.

A brief, seeded run belongs to the fast tests. `make fuzz` sets FOLEY_FUZZ_EXAMPLES: so many examples of each property,
new ones every time.
"""

import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from foley.accel.caching.schedule import SignatureMismatchError
from foley.core.components import CheckpointError
from foley.data.audio import AudioError
from foley.data.latents import LatentCacheError
from foley.data.shards import ShardError

LONGEST_CPU_SECONDS = 1.0  # of the processor: the clock on the wall also counts what else runs
MOST_BYTES = 2 << 30
CLEAR_ERRORS = (ValueError, OSError, AudioError, CheckpointError, LatentCacheError, ShardError, SignatureMismatchError)
LONGEST_MESSAGE = 4000  # characters

_examples = os.environ.get("FOLEY_FUZZ_EXAMPLES")
bounded = settings(
    max_examples=int(_examples or 30),
    derandomize=_examples is None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    database=None,
)
"""Decorates a property."""

T = TypeVar("T")


def right_or_named(call: Callable[[], T], *names: str) -> T | None:
    """What `call` returns; None where it raised a clear error whose message holds one of `names`.

    Any other error passes, and so does an assertion on the processor's time, the memory and the message's length.
    """
    started, peak = time.process_time(), _peak_bytes()
    value, message = _outcome(call)
    assert message is None or any(name in message for name in names), f"the error names none of {names}: {message}"
    assert len(message or "") < LONGEST_MESSAGE
    assert time.process_time() - started < LONGEST_CPU_SECONDS
    assert _peak_bytes() - peak < MOST_BYTES
    return value


def _outcome(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `call` returns, or the message of the clear error that it raises."""
    try:
        return call(), None
    except CLEAR_ERRORS as error:
        return None, str(error)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` after one to four accidents: a flipped bit, a cut, a hole of zeros, a doubled part, foreign bytes."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        # The beginning holds the headers: half of the accidents fall there.
        reach = min(len(content), 64) if draw(st.booleans()) else len(content)
        at = draw(st.integers(0, max(0, reach - 1)))
        length = draw(st.integers(1, 64))
        accident = draw(st.sampled_from(["flip", "cut", "zero", "double", "insert", "large"]))
        if accident == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif accident == "cut":
            del content[at:]
        elif accident == "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif accident == "double":
            content[at:at] = content[at : at + length]
        elif accident == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif accident == "large":
            content[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(content)


ABSURD_NUMBERS = st.sampled_from(
    [0, -1, 1, -0.0, 1e-9, 1e9, 2**31, 2**63, 10**400, 1e308, math.nan, math.inf, -math.inf, 0.5, True, False]
)
ABSURD_TEXT = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "nan",
        "null",
        "../x",
        "/etc/passwd",
        "a" * 100_000,
        "\ud800",
        "${oc.env:HOME}",
        "ü",
        "🐶",
        "os.system",
    ]
)
ABSURD_VALUES = st.one_of(st.none(), ABSURD_NUMBERS, ABSURD_TEXT, st.just([]), st.just({}), st.just([[[[]]]]))


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one thing at any depth is absent, absurd or there twice."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 4)) == 0:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: draw(altered(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        if draw(st.integers(0, 4)) == 0:
            return [*value, value[index]]
        return [*value[:index], draw(altered(value[index])), *value[index + 1 :]]
    return draw(ABSURD_VALUES)


def plain_text(max_size: int = 30, without: Sequence[str] = ()) -> st.SearchStrategy[str]:
    """Text that a file can hold: no halves of surrogate pairs, no NUL."""
    letters = st.characters(exclude_categories=["Cs"], exclude_characters=["\0", *without])
    return st.text(letters, min_size=1, max_size=max_size)
