"""Every `>>>` example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import io
from pathlib import Path

import pytest
import torch

import foley

PACKAGE = Path(foley.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples(package: Path = PACKAGE) -> list[str]:
    """Names of the modules whose source holds a `>>>`; none is imported before its own test."""
    files = [file for file in sorted(package.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
    parts = [file.relative_to(package.parent).with_suffix("").parts for file in files]
    return [".".join(names).removesuffix(".__init__") for names in parts]


def run_examples(name: str) -> tuple[int, str]:
    """The number of examples of a module that ran, and the report of those that failed."""
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report = io.StringIO()
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        torch.manual_seed(0)
        runner.run(example, out=report.write)
    return runner.tries, report.getvalue()


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that writes a file writes it there
    ran, failures = run_examples(name)
    assert not failures, f"an example of {name} does not print what it says:\n{failures}"
    assert ran, f"{name} holds '>>>' where doctest does not look: put examples into docstrings of public objects"


def test_an_example_that_is_wrong_is_reported(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text('"""One.\n\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    ran, failures = run_examples("wrong_example")
    assert ran == 1
    assert "Expected:" in failures
    assert "Got:" in failures
