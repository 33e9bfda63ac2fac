"""Tables of others: each of the inputs that once failed is read, or refused with its file and line."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foley.data import manifest, tables
from foley.data.manifest import ManifestError, ManifestOptions, build_entries, read_manifest
from foley.data.splits import clip_splits
from foley.data.tables import TableError, captions_in, csv_rows, table_rows
from foley.generation.prompts import read_prompts

CASES = Path(__file__).parent / "cases"
MEGABYTES = "x" * (2 << 20)


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # As manifests, the tables of prompts lack the column `path`, which is said first.
        ("prompts_unquoted_comma.csv", "line 2: has 3 cells where there are 2 columns (caption, id)"),
        ("prompts_open_quote.csv", "line 2: lines 2 to 4 are no row"),
        ("prompts_duplicate_column.csv", "line 1: has the columns ['caption'] twice"),
        ("prompts_duplicate_id.csv", "line 3: duplicate id '1', first used on line 2"),
        ("surrogate.jsonl", "line 1: JSON that cannot be used (it holds half a surrogate pair"),
        ("huge_integer.jsonl", "line 1: JSON that cannot be used (it holds an integer of"),
    ],
)
def test_cases_are_refused_as_prompts_and_as_manifests_with_the_line(name, message):
    with pytest.raises(ValueError, match=rf"(?s){name}.*{re.escape(message)}"):
        read_prompts(CASES / name)
    if name.endswith(".jsonl"):
        with pytest.raises(ManifestError, match=rf"(?s){name}.*{re.escape(message)}"):
            read_manifest(CASES / name)


def test_deep_nesting_is_refused_with_the_line(write):
    path = write("deeply_nested.jsonl", '{"path": "a.wav", "caption": "rain"}\n' + "[" * 100_000)
    for read in (read_prompts, read_manifest):
        with pytest.raises(ValueError, match=r"(?s)deeply_nested\.jsonl.*line 2: .*nested too deeply"):
            read(path)


def test_cases_that_are_read():
    assert read_prompts(CASES / "prompts_utf16.txt") == ["a dog barks", "rain falls"]
    assert [entry.id for entry in read_manifest(CASES / "manifest.json")] == ["a.wav", "b.wav"]
    assert read_prompts(CASES / "manifest.json") == ["rain falls", "a dog barks"]


def test_a_missing_column_is_one_error_that_says_how_to_name_it():
    path = CASES / "manifest_file_name_column.csv"
    message = "line 1: lacks the columns ['path'], has ['file_name', 'caption']; path_column="
    with pytest.raises(ManifestError, match=re.escape(message)):
        read_manifest(path)
    assert read_manifest(path, options=ManifestOptions(path_column="file_name"))[0].id == "a.wav"


def test_splits_by_other_names_lose_no_clip():
    entries = read_manifest(CASES / "splits_named_otherwise.jsonl")
    assert Counter(entry.split for entry in entries) == {"train": 3, "val": 3, "test": 2}
    splits = clip_splits(str(CASES / "splits_named_otherwise.jsonl"), 8000, check_files=False)
    assert {name: len(source) for name, source in splits.items()} == {"train": 3, "val": 3, "test": 2}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_prompts_are_read_by_their_byte_order_mark_and_manifests_refused(write, name, encoding):
    text = {"a.txt": "wörter\n", "a.csv": "caption\nwörter\n", "a.jsonl": '{"caption": "wörter"}\n'}[name]
    path = write(name, text.encode(encoding))
    assert read_prompts(path) == ["wörter"]
    with pytest.raises(ManifestError, match="line 1: starts with a byte-order mark"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["clips.csv", "clips.txt", "clips", "clips.ndjson", "clips.json"])
def test_json_lines_and_arrays_are_known_by_their_content(write, name):
    rows = [{"path": f"{n}.wav", "caption": "rain\u2028falls"} for n in range(3)]
    lines = write(name, "\n\n".join(map(json.dumps, rows)))
    assert [(entry.id, entry.line) for entry in read_manifest(lines)] == [("0.wav", 1), ("1.wav", 3), ("2.wav", 5)]
    array = write(name, json.dumps(rows, indent=1))
    assert [(entry.id, entry.line) for entry in read_manifest(array)] == [("0.wav", 2), ("1.wav", 6), ("2.wav", 10)]
    assert read_prompts(array) == ["rain\u2028falls"] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", f'caption\n"{MEGABYTES}"\n', "line 2: is over 1048576 characters"),
        ("a.txt", MEGABYTES, "line 1: is over"),
        ("a.jsonl", json.dumps({"caption": "x" * 200_000}), "line 1: over 131072 characters in `caption`"),
        ("a.txt", "rain\n" + "x" * 20_000, "line 2: a prompt has 20000 characters"),
        ("a.txt", "rain\nsn\0w\n", "line 2: a NUL character"),
        ("a.jsonl", '{"caption": "sn\\u0000w"}', "line 1: a NUL character"),
        ("a.csv", "caption\nsn\0w\n", "line 2: a NUL character"),
        ("a.txt", b"rain\n\xff\n", "line 2: not valid UTF-8"),
        ("a.txt", "rain".encode("utf-16") + b"\0", "not valid utf-16"),
        ("a.csv", b"\xef\xbb\xbfcaption\n\xff\n", "line 2: not valid UTF-8"),
        ("a.json", '[{"caption": "rain"},\n{"caption": }]', "line 2: the array is damaged here"),
        ("a.json", '[{"caption": "rain"}', "does not end"),
        ("a.json", '[{"caption": "rain"},]', "does not end"),
        ("a.json", "[1]", "line 1: expected a JSON object, got int"),
        ("a.json", "[]", "holds no prompt"),
        ("a.json", "{\n", "line 1: not valid UTF-8 JSON"),
        ("a.jsonl", '"rain"', "line 1: expected a JSON object, got str"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "caption\n", "holds no prompt"),
        ("a.csv", '"caption\n', "lines 1 to 1 are no row"),
    ],
)
def test_damage_is_refused_with_its_line(write, name, content, message):
    with pytest.raises(ValueError, match=rf"(?s){re.escape(name)}.*{re.escape(message)}"):
        read_prompts(write(name, content))


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(TableError, match="is a folder"):
        read_manifest(tmp_path)


def test_a_quote_left_open_loses_no_more_than_a_cell_may_hold(write):
    """Rows after the one that the csv module gives up on are read again."""
    path = write("a.csv", 'caption\n"' + "y\n" * 70_000 + "\n".join(["rain"] * 3))
    rows = dict(csv_rows(path, ["caption"]))
    assert "field larger than field limit" in rows[2]
    assert rows[70_004] == {"caption": "rain"}


def test_captions_of_several_columns_and_lists():
    assert captions_in({"a": " rain", "b": ["rain", "", "a shower", 7]}, ["a", "b"]) == ["rain", "a shower", "7"]
    for row, message in (({"a": ["", " "]}, "`a` is empty"), ({"a": [None]}, "`a` must be text"), ({}, "must be text")):
        with pytest.raises(ValueError, match=message):
            captions_in(row, ["a"])


def test_rows_are_read_one_by_one(write, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_LINE_CHARACTERS", 10)
    rows = table_rows(write("a.txt", "rain\n" + "x" * 20), text_column="caption")
    assert next(rows) == (1, {"caption": "rain"})
    with pytest.raises(TableError, match="line 2: is over 10 characters"):
        next(rows)


def test_rows_that_differ_in_the_caption_alone_are_one_clip(write):
    rows = [
        {"path": "a.wav", "caption": "rain", "split": "train"},
        {"path": "a.wav", "caption": ["a shower", "rain"], "split": "train"},
    ]
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError, match="lists no clips"):
        build_entries([], path, path.parent)
    (entry,) = read_manifest(path)
    assert (entry.caption, entry.other_captions, entry.line) == ("rain", ("a shower",), 1)
    path.write_text(path.read_text() + "\n" + json.dumps(rows[0] | {"caption": "x", "split": "val"}))
    with pytest.raises(ManifestError, match=r"line 3: duplicate id 'a\.wav', first used on line 1"):
        read_manifest(path)


TEXTS = [
    "a.wav",
    " b.wav ",
    "c/../d.wav",
    "/e.wav",
    "f\\g.wav",
    "",
    " ",
    "rain",
    "training",
    "x:y",
    "..",
    "\0",
    "\ud800",
    "é",
]
NUMBERS = [None, 3, 2**64, True, 2.5, -1.0, 1e300, math.inf, math.nan, "2.5"]
CELLS = st.sampled_from([*TEXTS, *NUMBERS, ["rain", "a shower"], ["rain"], [2**64], [], {"path": 1}])
NAMES = st.sampled_from(["path", "file", "caption", "captions", "id", "duration_seconds", "split", "label", "other"])
RIGHT = st.just({"path": "a.wav", "caption": "rain"})
ROWS = st.lists(st.one_of(RIGHT, st.dictionaries(NAMES, CELLS, max_size=5)), min_size=1, max_size=4)


@given(rows=ROWS, named=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_taken_at_once_are_those_taken_one_by_one(rows, named, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ManifestOptions(id_column="id", split_column="split") if named else ManifestOptions()

    def outcome() -> tuple[list, str]:
        try:
            return list(build_entries(options.rows(path), path, tmp_path, options)), ""
        except ManifestError as error:
            return [], str(error)

    at_once = outcome()
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(manifest, "_plain_columns", lambda rows, options: None)
        one_by_one.setattr(tables, "_plain_rows", lambda lines: [])
        assert outcome() == at_once


@given(lines=st.lists(st.text('{}[]":,\\ \t1a.eé', max_size=12), min_size=1, max_size=4))
@settings(deadline=None)
def test_lines_parsed_at_once_are_those_parsed_one_by_one(lines):
    rows = tables._plain_rows([f"{line}\n" for line in lines])
    assert not rows or [*enumerate(rows, 1)] == list(tables._checked_lines(1, lines))


@pytest.mark.parametrize(
    "lines",
    [['{"a": 1, "a": 2}'], ['{"a" :1,"a":2}'], ['{"a":1},{"b":2', '"c":3}'], ['{"a":1', '"b":2}']],
)
def test_lines_of_which_one_is_wrong_are_not_parsed_at_once(lines):
    assert tables._plain_rows(lines) == []


def test_plain_lines_are_parsed_at_once():
    row = {"path": "a.wav", "caption": "rain", "duration_seconds": 2.5, "captions": ["a", "b"]}
    assert tables._plain_rows([json.dumps(row)]) == [row]
