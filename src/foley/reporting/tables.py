"""Tables in Markdown, and where a measurement comes from: what a page of results is made of."""

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import torch

from foley.core.config import PROJECT_ROOT
from foley.core.devices import described_processor

Row = Mapping[str, Any]


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_rows(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of `rows`, whose cells are empty where a row has nothing.

    Args:
        columns: each heading, and the format of its cells in terms of a row: `{"dense": "{dense[seconds]:.2f} s"}`.

    Raises ValueError where a column would be empty: no row has what its format asks for.
    """
    cells = [[format_cell(form, row) for form in columns.values()] for row in rows]
    for column, (heading, form) in zip(zip(*cells, strict=True), columns.items(), strict=False):
        if not any(column):
            raise ValueError(f"column {heading!r}: none of the {len(rows)} rows has what {form!r} asks for")
    return markdown_table(tuple(columns), [tuple(row) for row in cells])


def format_cell(form: str, row: Row) -> str:
    """`form` filled in from `row`; empty where any of its values is None or absent."""
    try:
        return _MEASURED.vformat(form, (), row)
    except (KeyError, _NothingError):
        return ""


class _NothingError(Exception):
    """A value that was not measured."""


class _Measured(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise _NothingError
        return str(format(value, format_spec))


_MEASURED = _Measured()


def provenance() -> dict[str, str]:
    """What a number was measured on, and of which state of the code; plain text, fit for JSON and for a page."""
    facts = {
        "command": shlex.join(["python", *sys.argv]).replace(f"{PROJECT_ROOT}/", ""),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "processor": described_processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(describe, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
