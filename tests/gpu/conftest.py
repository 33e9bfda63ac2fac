"""Proofs: each test of this folder has the number of one, `@pytest.mark.gpu(proof=8)`, and its outcome is kept.

`FOLEY_PROOFS=FILE` gets, after each test, what it proves, its outcome, and what it recorded by `record_property`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_parts import DEVICE

from foley.core.files import write_json
from foley.core.reading import read_json
from foley.reporting.tables import provenance

_FACTS = ("proof", "what")


@pytest.fixture(autouse=True)
def _left_as_it_was() -> Iterator[None]:
    """One proof's process group, memory and compiled graphs are not the next one's."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("gpu")
    words = " ".join((item.obj.__doc__ or "").split())  # type: ignore[attr-defined]
    item.user_properties += [("proof", mark.kwargs["proof"] if mark else None), ("what", words)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = os.environ.get("FOLEY_PROOFS")
    if not file or (report.when != "call" and report.outcome == "passed"):
        return
    path, known = Path(file), []
    if path.is_file():
        known = read_json(path, "the outcomes of proofs", "remove it, and they are written anew")["proofs"]
    row = _row(report)
    rows = sorted([row, *(other for other in known if other["test"] != row["test"])], key=_order)
    origin = {**provenance(), "command": "python -m pytest tests/gpu"}  # not where pytest is installed
    write_json(path, {"proofs": rows, "provenance": origin})


def _order(row: dict[str, Any]) -> tuple[int, str]:
    return row["proof"] or 0, row["test"]


def _row(report: pytest.TestReport) -> dict[str, Any]:
    facts = dict(report.user_properties)
    figures = {name: value for name, value in facts.items() if name not in _FACTS}
    why = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        why = (report.longreprtext.strip().splitlines() or [""])[-1]
    return {
        **{name: facts.get(name) for name in _FACTS},
        "test": report.nodeid.rpartition("/")[2],
        "outcome": report.outcome,
        "why": why,
        "seconds": round(report.duration, 1),
        "figures": figures,
        "measured": ", ".join(f"{name} {value}" for name, value in figures.items()) or why,
    }
