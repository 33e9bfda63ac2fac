"""JSON Lines files written row by row, and whole or not at all."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foley.files import replacing

WriteRow = Callable[[Mapping[str, Any]], None]


@contextmanager
def json_lines(path: Path) -> Iterator[WriteRow]:
    """What appends a row to a file that takes the place of `path` where the block ends without an error.

    Characters that UTF-8 cannot hold (halves of surrogate pairs, in some captions) become question marks.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as stream:

        def write(row: Mapping[str, Any]) -> None:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write
