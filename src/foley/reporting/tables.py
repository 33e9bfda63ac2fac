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

COST_COLUMNS = {"TMACs?": "{tmacs:.3g}", "seconds?": "{seconds:.3g}", "RTF?": "{real_time_factor:.3g}"}
"""What a table of acceleration says beside its ratios, as those of the papers do; of all clips of the row together."""


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_rows(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of `rows`, whose cells are empty where a row has nothing.

    Args:
        columns: each heading, and the format of its cells in terms of a row: `{"dense": "{dense[seconds]:.2f} s"}`.
            Where the heading ends in "?" the column is left out if it would be empty, as results of an earlier
            benchmark may have it.

    Raises ValueError where another column would be empty: no row has what its format asks for.

    >>> print(format_rows([{"way": "dense", "seconds": 2.0}], {"": "{way}", **COST_COLUMNS}))
    |  | seconds |
    | --- | ---: |
    | dense | 2 |
    """
    filled = {heading: [format_cell(form, row) for row in rows] for heading, form in columns.items()}
    filled = {heading: cells for heading, cells in filled.items() if any(cells) or not heading.endswith("?")}
    for heading, cells in filled.items():
        if not any(cells):
            raise ValueError(f"column {heading!r}: none of the {len(rows)} rows has what {columns[heading]!r} asks for")
    return markdown_table(
        tuple(heading.removesuffix("?") for heading in filled), list(zip(*filled.values(), strict=True))
    )


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
