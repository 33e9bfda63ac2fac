import json
from pathlib import Path

import pytest

from foley.data.importers.annotations import read_audiocaps
from foley.data.manifest import ManifestError, ManifestOptions, checked_rows, read_manifest

GOOD = {"path": "a.wav", "caption": "a dog barks"}


def test_fields_aliases_and_defaults(tmp_path, write_jsonl):
    path = write_jsonl(GOOD | {"seconds": 1.5, "split": "val", "label": "dog", "extra": [1]}, GOOD | {"id": 7})
    first, second = read_manifest(path)
    assert first.path == tmp_path / "a.wav"
    assert (first.id, first.duration_seconds, first.split, first.label, first.line) == ("a.wav", 1.5, "val", "dog", 1)
    assert (second.id, second.duration_seconds, second.split) == ("7", None, "")
    assert read_manifest(path, root="/elsewhere")[0].path.as_posix() == "/elsewhere/a.wav"


def test_shared_clips_load_as_they_are(shared):
    entries = read_manifest(shared / "data" / "clips.jsonl")
    assert len(entries) == 3637
    assert all(entry.path.is_file() for entry in entries)
    assert {entry.split for entry in entries} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"caption": "x"}, "`path` must be text and is missing: the row has .'caption'.; path_column="),
        (GOOD | {"caption": "  "}, "`caption` is empty"),
        (GOOD | {"caption": None}, "`caption` must be text"),
        (GOOD | {"path": "../b.wav"}, r"'\.\./b\.wav' leaves"),
        (GOOD | {"path": "x/../../b.wav"}, "leaves"),
        (GOOD | {"path": "/etc/passwd"}, "leaves"),
        (GOOD | {"path": "C:\\b.wav"}, "leaves"),
        (GOOD | {"path": "..\\b.wav"}, "leaves"),
        (GOOD | {"duration_seconds": float("nan")}, "positive number"),
        (GOOD | {"duration_seconds": True}, "positive number"),
        (GOOD | {"seconds": 0}, "positive number"),
        (GOOD, "duplicate id 'a.wav', first used on line 1"),
        ([1, 2], "expected a JSON object"),
    ],
)
def test_wrong_lines_are_refused_with_their_number(bad, message, tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(ManifestError, match=rf"(?s)line 3: .*({message})"):
        read_manifest(path)


@pytest.mark.parametrize(
    "line",
    [
        b"{not json",
        b'{"path": "a\xff.wav", "caption": "x"}',
    ],
)
def test_bad_json_and_encoding_are_refused_with_their_number(line, tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(ManifestError, match="line 2: not valid UTF-8 JSON"):
        read_manifest(path)


def test_a_row_that_names_one_thing_twice_is_refused_with_its_number(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"path": "b.wav", "caption": "rain", "caption": "wind"}')
    with pytest.raises(ManifestError, match=r"line 2: .*it names 'caption' twice"):
        read_manifest(path)


def test_byte_order_mark_missing_and_empty_manifests(tmp_path):
    path = tmp_path / "clips.jsonl"
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(path)
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    with pytest.raises(ManifestError, match=r"line 1: .*byte-order mark"):
        read_manifest(path)
    path.write_text("\n")
    with pytest.raises(ManifestError, match="lists no clips"):
        read_manifest(path)


def test_every_wrong_line_is_listed(tmp_path, write_jsonl):
    path = write_jsonl(*[GOOD] * 30)
    with pytest.raises(ManifestError, match=r"(?s)29 wrong lines.*line 2:.*line 21:.*and 9 more"):
        read_manifest(path)
    with pytest.raises(ManifestError, match=r"has 1 wrong line; mend or remove it:\n  line 2: duplicate"):
        read_manifest(write_jsonl(*[GOOD] * 2))


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables(suffix, delimiter, tmp_path):
    path = tmp_path / f"clips{suffix}"
    rows = [
        ["audio_path", "caption", "split", "seconds"],
        ["a.wav", '"one, two"', "val", "1.5"],
        ["b.wav", "x", "", ""],
    ]
    path.write_text("\n".join(delimiter.join(row) for row in rows))
    first, second = read_manifest(path)
    assert (first.caption, first.split, first.duration_seconds) == ("one, two", "val", 1.5)
    assert (second.path, second.split, second.duration_seconds) == (tmp_path / "b.wav", "", None)


def test_wrong_tables_are_refused_with_the_line(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("audio_path,words\na.wav,x\n")
    with pytest.raises(ManifestError, match=r"line 1: lacks the columns \['caption'\]"):
        read_manifest(path)
    path.write_text("audio_path,caption\na.wav,x\n../a.wav,y\n")
    with pytest.raises(ManifestError, match="line 3: path"):
        read_manifest(path)
    path.write_text("audio_path,caption,seconds\na.wav,x,long\n")
    with pytest.raises(ManifestError, match="line 2: `duration_seconds`"):
        read_manifest(path)
    path.write_bytes(b"audio_path,caption\na.wav,\xff\n")
    with pytest.raises(ManifestError, match="line 2: not valid UTF-8"):
        read_manifest(path)
    (tmp_path / "clips.xlsx").write_bytes(b"PK\3\4")
    with pytest.raises(ManifestError, match="expected a table"):
        read_manifest(tmp_path / "clips.xlsx")


def test_columns_by_other_names_and_paths_from_elsewhere(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(
        "file_name,text,more,key,fold,path,seconds\n/x/a.wav,rain,a shower,7,Dev,old,1.5\n../b.wav,wind,,8,,,\n"
    )
    columns = {"path_column": "file_name", "caption_column": ["text", "more"], "id_column": "key"}
    with pytest.raises(ManifestError, match=r"(?s)line 2: .*'/x/a\.wav' leaves.*absolute_paths=true.*line 3: .*leaves"):
        read_manifest(path, options=ManifestOptions(**columns))
    options = ManifestOptions(**columns, absolute_paths=True)
    first, second = read_manifest(path, options=options)
    assert (first.path, first.id, first.other_captions) == (Path("/x/a.wav"), "7", ("a shower",))
    assert (second.path, second.caption, second.split) == (tmp_path / "../b.wav", "wind", "")
    (_, row), (_, other) = checked_rows(path, options)
    assert (row["path"], row["id"], row["caption"], row["captions"]) == ("/x/a.wav", "7", "rain", ["rain", "a shower"])
    assert (row["duration_seconds"], "captions" in other) == (1.5, False)


@pytest.mark.parametrize("column", ["path_column", "caption_column", "id_column", "split_column"])
def test_a_column_that_is_named_must_be_there(column, tmp_path, write_jsonl):
    options = ManifestOptions(**{column: "absent"})
    with pytest.raises(ManifestError, match=r"line 1: `.*` must be text"):
        read_manifest(write_jsonl(GOOD), options=options)
    (tmp_path / "clips.csv").write_text("path,caption\na.wav,x\n")
    with pytest.raises(ManifestError, match=r"line 1: lacks the columns \['absent'\]"):
        read_manifest(tmp_path / "clips.csv", options=options)


def test_numbers_that_no_duration_is(write_jsonl):
    for value in (10**400, "1e999", [1], "long"):
        with pytest.raises(ManifestError, match="line 1: `duration_seconds` must be a positive number"):
            read_manifest(write_jsonl(GOOD | {"duration_seconds": value}))


def test_audiocaps_patterns_that_do_not_fit(tmp_path):
    (tmp_path / "test.csv").write_text("audiocap_id,youtube_id,start_time,caption\n1,a,0,x\n")
    with pytest.raises(ValueError, match=r"^file_pattern='\{id\}\.wav' does not fit: the columns are"):
        read_audiocaps(tmp_path / "test.csv", tmp_path, "{id}.wav")


def test_audiocaps(shared, tmp_path):
    entries = read_audiocaps(shared / "data" / "audiocaps" / "test.csv", tmp_path, "{youtube_id}.flac")
    assert len(entries) == 4875
    assert (entries[0].id, entries[0].path, entries[0].split) == ("103549", tmp_path / "7fmOlUlwoNg.flac", "test")
