"""Prompts from files and from the command line."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMN = "caption"


def read_prompts(path: Path) -> list[str]:
    """Prompts out of a file: a `caption` column of .csv or .jsonl, or else one prompt on each non-empty line.

    Raises ValueError, with the line number, where there is none.
    """
    if not path.is_file():
        raise ValueError(f"prompts={path}: there is no such file")
    text = path.read_text(encoding="utf-8-sig")
    readers = {".csv": _from_csv, ".jsonl": _from_jsonl}
    prompts = readers.get(path.suffix.lower(), _from_lines)(text, path)
    if not prompts:
        raise ValueError(f"prompts={path}: the file holds no prompt")
    return prompts


def request_clips(prompt: str | None, file: str | None, first_seed: int, num: int) -> tuple[list[str], list[int]]:
    """Every clip asked for, as equally long lists of prompts and seeds: `num` clips of each prompt.

    Raises ValueError unless exactly one of `prompt` and `file` is given and `num` is at least 1.
    """
    if (prompt is None) == (file is None):
        raise ValueError('give either prompt="a dog barks" or prompts=FILE')
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    prompts = read_prompts(Path(file)) if file is not None else [str(prompt)]
    return [p for p in prompts for _ in range(num)], [first_seed + i for _ in prompts for i in range(num)]


def quote_overrides(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Quote the values of free-text Hydra overrides, so that commas, quotes and `${` in a prompt are just text."""
    return [_quote(argument) if argument.partition("=")[0] in keys else argument for argument in arguments]


def _quote(override: str) -> str:
    key, _, value = override.partition("=")
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return override
    # Hydra reads a backslash as an escape only where it precedes a quote or an interpolation.
    escaped = re.sub(r"(\\*)('|\$\{|$)", lambda match: 2 * match[1] + ("\\" + match[2] if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _from_lines(text: str, path: Path) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_csv(text: str, path: Path) -> list[str]:
    reader = csv.DictReader(text.splitlines())
    if COLUMN not in (reader.fieldnames or ()):
        raise ValueError(f"prompts={path}: no {COLUMN!r} column, only {reader.fieldnames}")
    return [_caption(row, path, reader.line_num) for row in reader]


def _from_jsonl(text: str, path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"prompts={path}, line {number}: not JSON ({error})") from error
            prompts.append(_caption(row, path, number))
    return prompts


def _caption(row: Any, path: Path, line_number: int) -> str:
    caption = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(caption, str):
        raise ValueError(f"prompts={path}, line {line_number}: no {COLUMN!r}")
    return caption
