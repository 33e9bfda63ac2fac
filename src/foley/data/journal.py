"""Results that outlive a killed run: JSON lines that each rank appends to a file of its own."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class JournalError(ValueError):
    """A journal with a line in its middle that cannot be read; the message names the file and the line."""


class Journal:
    """Appends results to `directory/<name>-rank<rank>.jsonl`; what `append` was given is on the disk when it returns.

    A process killed while it writes leaves a torn last line. Readers pass over it, and the next journal of that
    rank cuts it off.
    """

    def __init__(self, directory: Path, name: str, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}-rank{rank:04d}.jsonl"
        self._stream = self.path.open("ab+")
        self._cut_torn_line()

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Write one line for each result, and flush to the disk."""
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        self._stream.write(lines.encode("utf-8", errors="replace"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _cut_torn_line(self) -> None:
        end = self._stream.seek(0, os.SEEK_END)
        while end and not _ends_line(self._stream, end):
            end -= 1
        self._stream.truncate(end)


def _ends_line(stream: Any, end: int) -> bool:
    stream.seek(end - 1)
    return bool(stream.read(1) == b"\n")


def read_journals(directory: Path, name: str) -> Iterator[dict[str, Any]]:
    """The results of all ranks, those of an earlier run on other ranks too; raises JournalError."""
    for path in sorted(directory.glob(f"{name}-rank*.jsonl")):
        with path.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    yield json.loads(raw)
                except ValueError as error:
                    raise JournalError(f"{path}, line {line}: not JSON ({error}); remove the line") from error
