"""Pages of results: a Markdown template, filled in from the JSON files that benchmarks wrote beside the page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from foley.core.files import write_json, write_text
from foley.core.reading import read_json
from foley.metrics.latency import RealTimeFactor
from foley.reporting.fewer_steps import (
    AGAINST_COLUMNS,
    ERROR_COLUMNS,
    QUALITY_COLUMNS,
    count_beating,
    prediction_aims,
    undisturbed,
)
from foley.reporting.plots import plot_rows
from foley.reporting.tables import COST_COLUMNS, Row, format_rows

NOT_MEASURED = "Not measured yet."


def read_asset(*names: str) -> str:
    """The files of those names beside this module, joined: what a page of HTML holds, so that it needs no other file.

    >>> read_asset("page.css").startswith(":root")
    True
    """
    return "".join(files("foley.reporting").joinpath(name).read_text(encoding="utf-8") for name in names)


@dataclass(frozen=True)
class Results:
    """The folder of a page's measurements: what its template may use."""

    folder: Path

    def read(self, name: str) -> Any:
        """The JSON file of that name; None where the benchmark that writes it has not been run."""
        file = self.folder / name
        return read_json(file, "the result of a benchmark", "run the benchmark again") if file.is_file() else None

    def table(self, results: Any, part: str, columns: Mapping[str, str], **wanted: Any) -> str:
        """The rows at `part` ("codecs.tiny.stages") of what `read` returned, as `format_rows` takes them.

        `wanted` chooses rows by their values: `system="teacher"`.
        """
        rows = self.rows(results, part, **wanted)
        return format_rows(rows, columns) if rows else NOT_MEASURED

    def rows(self, results: Any, part: str, **wanted: Any) -> list[Row]:
        """As `table`; each entry of a mapping is a row, with its key as `name`. None where there is no such part."""
        found = reduce(lambda value, key: value.get(key, {}), part.split("."), results or {})
        rows = [{"name": key, **row} for key, row in found.items()] if isinstance(found, dict) else found
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def rtf(self, rows: Sequence[Row]) -> str:
        """A sentence on what the RTF of the rows is of, machines and batches; nothing where none was measured."""
        known = [rtf for rtf in map(RealTimeFactor.of_json, rows) if rtf is not None]
        places = "; ".join(dict.fromkeys(rtf.where for rtf in known if rtf.where))
        where = f" ({places})" if places else ""
        return f"RTF is seconds of computing over seconds of audio{where}." if known else ""

    def plot(
        self, name: str, rows: Sequence[Row], x: str, measures: Mapping[str, str], line: str, **options: Any
    ) -> str:
        """Draw `foley.reporting.plots.plot_rows` into the file of that name; the image, or nothing without rows."""
        return self.picture(name) if plot_rows(rows, x, measures, line, self.folder / name, **options) else ""

    def picture(self, name: str) -> str:
        """The image of that name, which a benchmark drew; nothing where there is none."""
        file = self.folder / name
        return f"![{file.stem}]({self.folder.name}/{name})" if file.is_file() else ""

    def origin(self, results: Any) -> str:
        """The command, commit, date and machine of what `read` returned; nothing for None."""
        if results is None:
            return ""
        facts = dict(results["provenance"])
        command = facts.pop("command", None)
        rest = ", ".join(f"{name} {value}" for name, value in facts.items())
        return f"Measured with `{command}` ({rest})." if command else f"Measured at {rest}."


def write_page(template: Path, page: Path, folder: Path | None = None, **facts: Any) -> None:
    """Fill in `template`, which may use `facts` too, and of acceleration the columns `cost`, `against` and `quality`.

    The results and pictures lie in `folder`; by default in the one beside `page` that has its name.

    Raises as jinja2 does for a template that asks for what is not there.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    results = Results(folder or page.with_suffix(""))
    names = ("read", "table", "rows", "rtf", "plot", "picture", "origin")
    tools = {name: getattr(results, name) for name in names}
    columns = {"cost": COST_COLUMNS, "errors": ERROR_COLUMNS, "against": AGAINST_COLUMNS, "quality": QUALITY_COLUMNS}
    compare = {"count_beating": count_beating, "prediction_aims": prediction_aims, "undisturbed": undisturbed}
    text = environment.get_template(template.name).render(**compare, **columns, **tools, **facts)
    write_text(page, re.sub(r"\n{3,}", "\n\n", text))  # what was left out leaves blank lines


def write_results(page: Path, **results: Any) -> None:
    """Write what benchmarks found, by the names of the JSON files beside `page`, and by its template the page."""
    for name, result in results.items():
        write_json(page.with_suffix("") / f"{name}.json", result)
    write_page(page.parent / "templates" / page.name, page)
