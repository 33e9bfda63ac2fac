"""Reading files that others wrote: right, or one error that names the file, what is wrong with it, and the mend.

A damaged file makes its parser raise whatever the parser raises: `JSONDecodeError`, `UnicodeDecodeError`, `KeyError`,
`SafetensorError`, `RecursionError`, none of which names the file. Whatever foley reads is read inside `reading`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_DAMAGE = (SafetensorError, UnicodeError, RecursionError, LookupError, TypeError, AttributeError, ValueError, EOFError)

_MAX_DIGITS = 4300


class DamagedFileError(ValueError):
    """A file that is not what it should be; the message names it, and `reason` is what is wrong with it alone."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@contextmanager
def reading(path: Path | str, what: str, mend: str = "make it anew") -> Iterator[None]:
    """A block that reads `path`: what damage makes it raise becomes one DamagedFileError.

    Args:
        path: the file, with the line where it has lines.
        what: what the file should be, as "the index of a latent cache".
        mend: what the user can do.

    Absent files and refusals of the system (OSError) name their file already, and pass.

    >>> with reading("clips.json", "clips"):
    ...     {}["seed"]
    Traceback (most recent call last):
    foley.core.reading.DamagedFileError: clips.json is damaged or not clips: it lacks the entry 'seed'; make it anew
    """
    try:
        yield
    except DamagedFileError:
        raise
    except _DAMAGE as error:
        raise _damaged(error, path, what, mend) from error


def read_json(path: Path, what: str, mend: str = "make it anew") -> Any:
    """The content of a JSON file; raises DamagedFileError as `parse_json` does, and FileNotFoundError."""
    with reading(path, what, mend):
        text = path.read_text(encoding="utf-8-sig")
    return parse_json(text, path, what, mend)


def parse_json(text: str, where: Path | str, what: str = "JSON", mend: str = "mend it") -> Any:
    """The value of a JSON text.

    Raises DamagedFileError, which names `where`, for text that is no JSON, is nested too deeply, holds an integer of
    thousands of digits, a name twice in one object, or half a surrogate pair, which no file can be written with.
    """
    try:  # not `reading`, whose block costs as much as a row of a manifest does
        value = _DECODER.decode(text)
        if not text.isascii():
            text.encode("utf-8")
        if "\\u" in text:
            # An escape such as \\ud800 is read without complaint; writing it fails, perhaps hours later.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _DAMAGE as error:
        raise _damaged(error, where, what, mend) from error
    return value


def _damaged(error: Exception, path: Path | str, what: str, mend: str) -> DamagedFileError:
    reason = _reason(error)
    return DamagedFileError(f"{path} is damaged or not {what}: {reason}; {mend}", reason)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open which of two values counts; whoever wrote both meant something by each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def whole_number(digits: str) -> int:
    """The integer of a JSON text; raises ValueError for one that no file of ours can mean, at Python's own limit."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=whole_number)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks the entry {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return f"it holds half a surrogate pair, {error.object[error.start : error.end]!r}"
    return str(error) or type(error).__name__
