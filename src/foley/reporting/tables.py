"""Markdown tables of measured rows."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

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
