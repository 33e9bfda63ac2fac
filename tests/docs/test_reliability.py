"""The page of faults names tests that exist, and no row of it is missing."""

import ast
import re

from foley.core.config import PROJECT_ROOT

TESTS = PROJECT_ROOT / "tests"
PAGE = (PROJECT_ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NUM_ROWS = 52


def defined_in(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert [f"{file}::{test}" for file, test in named if test not in defined_in(file)] == []


def test_no_row_is_missing_and_each_names_a_test() -> None:
    rows = {int(line[2:].partition(".")[0]): line for line in PAGE.splitlines() if re.match(r"\| \d+\. ", line)}
    assert sorted(rows) == list(range(1, NUM_ROWS + 1))
    assert [number for number, line in rows.items() if "::test_" not in line] == []
