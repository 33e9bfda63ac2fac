"""Prompts from files and from the command line."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMN = "caption"
_NOTES = ("label", "id")


@dataclass(frozen=True)
class ClipRequest:
    """One clip asked for; `notes` are the prompt's label and id where its file gives them."""

    prompt: str
    seed: int
    notes: Mapping[str, str] = field(default_factory=dict)


def read_prompts(path: Path) -> list[str]:
    """The captions of `read_prompt_rows`."""
    return [row[COLUMN] for row in read_prompt_rows(path)]


def read_prompt_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with a `caption` out of a .csv or .jsonl file, or else one caption on each non-empty line.

    Raises ValueError, with the line number, where there is none.
    """
    if not path.is_file():
        raise ValueError(f"prompts={path}: there is no such file")
    text = path.read_text(encoding="utf-8-sig")
    readers = {".csv": _from_csv, ".jsonl": _from_jsonl}
    rows = readers.get(path.suffix.lower(), _from_lines)(text, path)
    if not rows:
        raise ValueError(f"prompts={path}: the file holds no prompt")
    return rows


def request_clips(prompt: str | None, file: str | None, first_seed: int, num: int) -> list[ClipRequest]:
    """Every clip asked for: `num` clips of each prompt, with seeds that count up from `first_seed`.

    Raises ValueError unless exactly one of `prompt` and `file` is given and `num` is at least 1.
    """
    if (prompt is None) == (file is None):
        raise ValueError('give either prompt="a dog barks" or prompts=FILE')
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    rows = read_prompt_rows(Path(file)) if file is not None else [{COLUMN: str(prompt)}]
    repeated = [row for row in rows for _ in range(num)]
    # An id names one clip: it pairs a generated clip with its reference.
    kept = _NOTES if num == 1 else ("label",)
    return [
        ClipRequest(row[COLUMN], seed, {name: row[name] for name in kept if row.get(name)})
        for seed, row in enumerate(repeated, start=first_seed)
    ]


def quote_overrides(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Quote the values of free-text Hydra overrides, so that commas, quotes and `${` in a prompt are just text."""
    return [_quote(argument) if argument.partition("=")[0] in keys else argument for argument in arguments]


def name_model(arguments: Sequence[str]) -> list[str]:
    """`model=NAME` chooses out of configs/published where something is generated; configs/model is for training."""
    return [re.sub("^model=", "published=", argument) for argument in arguments]


def _quote(override: str) -> str:
    key, _, value = override.partition("=")
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return override
    # Hydra reads a backslash as an escape only where it precedes a quote or an interpolation.
    escaped = re.sub(r"(\\*)('|\$\{|$)", lambda match: 2 * match[1] + ("\\" + match[2] if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _from_lines(text: str, path: Path) -> list[dict[str, Any]]:
    return [{COLUMN: line.strip()} for line in text.splitlines() if line.strip()]


def _from_csv(text: str, path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if COLUMN not in (reader.fieldnames or ()):
        raise ValueError(f"prompts={path}: no {COLUMN!r} column, only {reader.fieldnames}")
    return [_checked(row, path, reader.line_num) for row in reader]


def _from_jsonl(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines: JSON strings may hold other line separators than the newline.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"prompts={path}, line {number}: not JSON ({error})") from error
            rows.append(_checked(row, path, number))
    return rows


def _checked(row: Any, path: Path, line_number: int) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get(COLUMN), str):
        raise ValueError(f"prompts={path}, line {line_number}: no {COLUMN!r}")
    return row
