"""Manifests and prompt files: what was written comes back, and what was damaged is refused by file, line or value."""

import csv
import io
import json
from pathlib import Path

from fuzzing import altered, bounded, damaged, plain_text, right_or_named
from hypothesis import given
from hypothesis import strategies as st

from foley.data.manifest import read_manifest
from foley.generation.prompts import read_prompt_rows

# One line each, not only white space, and nothing that reading strips from the ends.
CAPTIONS = plain_text(without=["\r", "\n"]).filter(lambda text: text == text.strip() and text.isprintable())
ROWS = [{"path": f"clips/{index}.wav", "caption": f"dog {index}, barking", "split": "train"} for index in range(5)]


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder: Path, ending: str, rows: list[dict[str, str]]) -> bytes:
    return {"csv": as_csv(rows), "tsv": as_csv(rows, "\t"), "jsonl": as_json_lines(rows)}[ending].encode()


@bounded
@given(st.sampled_from(["csv", "tsv", "jsonl"]), st.lists(CAPTIONS, min_size=1, max_size=5))
def test_prompts_come_back_as_they_were_written(tmp_path: Path, ending: str, captions: list[str]) -> None:
    path = tmp_path / f"prompts.{ending}"
    path.write_bytes(written(tmp_path, ending, [{"id": str(i), "caption": text} for i, text in enumerate(captions)]))
    assert [row["caption"] for row in read_prompt_rows(path)] == captions


@bounded
@given(st.lists(CAPTIONS, min_size=1, max_size=5))
def test_captions_of_a_manifest_come_back_as_they_were_written(tmp_path: Path, captions: list[str]) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(as_json_lines([{"path": f"{i}.wav", "caption": text} for i, text in enumerate(captions)]))
    assert [entry.caption for entry in read_manifest(path)] == captions


@bounded
@given(st.data())
def test_a_damaged_prompt_file_is_read_or_refused_by_its_name(tmp_path: Path, data: st.DataObject) -> None:
    ending = data.draw(st.sampled_from(["csv", "tsv", "jsonl"]))
    path = tmp_path / f"prompts.{ending}"
    path.write_bytes(data.draw(damaged(written(tmp_path, ending, ROWS))))
    rows = right_or_named(lambda: read_prompt_rows(path), str(path))
    assert rows is None or all(isinstance(row["caption"], str) and "\0" not in row["caption"] for row in rows)


@bounded
@given(st.data())
def test_a_damaged_manifest_is_read_or_refused_by_its_name(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(data.draw(damaged(as_json_lines(ROWS).encode())))
    entries = right_or_named(lambda: read_manifest(path), str(path))
    assert entries is None or all(entry.path.is_relative_to(tmp_path) and entry.caption for entry in entries)


@bounded
@given(altered(ROWS))
def test_a_manifest_of_absurd_values_is_read_or_refused_by_its_name(tmp_path: Path, rows: object) -> None:
    path = tmp_path / "manifest.jsonl"
    lines = rows if isinstance(rows, list) else [rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    entries = right_or_named(lambda: read_manifest(path), str(path))
    assert entries is None or len({entry.id for entry in entries}) == len(entries)
