"""Manifests in columns: what they say is what rows say, parsed once, and shared by processes without a copy."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest

from foley.core.columns import Columns
from foley.data import manifest as manifests
from foley.data import remembered
from foley.data.entries import Entries, ManifestEntry
from foley.data.manifest import ManifestError, ManifestOptions, of_split, read_manifest
from foley.data.splits import hold_out

MANY = 100_000


@pytest.fixture
def parses(tmp_path, monkeypatch):
    """A cache folder of its own, no manifest too small for it; the manifests that were parsed."""
    parsed: list[Path] = []
    build = manifests.build_entries
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manifests, "_WORTH_REMEMBERING_BYTES", 1)
    monkeypatch.setattr(
        manifests, "build_entries", lambda rows, path, *rest: parsed.append(path) or build(rows, path, *rest)
    )
    return parsed


def settled(path: Path, seconds_ago: float = 60.0) -> Path:
    """`path`, last changed a while ago."""
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def entry(n: int, **fields: object) -> ManifestEntry:
    return ManifestEntry(Path(f"{n}.wav"), f"caption {n}", str(n), line=n + 1, **fields)  # type: ignore[arg-type]


def test_entries_are_the_sequence_that_they_were_made_of():
    known = [
        entry(0, duration_seconds=1.5, split="val", other_captions=("ä", "b")),
        entry(1, label="dog"),
        entry(2, split="train", license="CC0"),
    ]
    entries = Entries.of(known)
    assert entries == known
    assert [entries[-1], *entries[::-2]] == [known[2], known[2], known[0]]
    assert entries.splits == ["val", "", "train"]
    assert entries.of_split("train") == [known[2]]
    assert entries.with_splits(np.array([3, 0, 1], np.uint8)).of_split("test")[0].id == "0"
    assert np.array_equal(np.isnan(entries.duration_seconds), [False, True, True])
    assert Entries.of(entries) is entries
    assert pickle.loads(pickle.dumps(entries[1:])) == known[1:]
    assert Entries.of([]) == []
    assert Entries.of([]).splits == []


def test_a_large_manifest_is_parsed_once_and_then_mapped(parses, write_jsonl):
    path = settled(write_jsonl(*({"path": f"{n}.wav", "caption": f"räin {n}", "seconds": n + 1} for n in range(50))))
    first, again = read_manifest(path), read_manifest(path, root="/elsewhere")
    assert parses == [path]
    assert [known.path for known in again] == [Path("/elsewhere") / f"{n}.wav" for n in range(50)]
    assert first[7] == ManifestEntry(path.parent / "7.wav", "räin 7", "7.wav", 8.0, line=8)
    copy = pickle.dumps(again)
    assert len(copy) < 1000  # a path: a process that is spawned maps the same file
    assert pickle.loads(copy) == again
    read_manifest(path, options=ManifestOptions(absolute_paths=True))
    assert len(parses) == 2  # other options may refuse other rows
    settled(path, seconds_ago=30)
    read_manifest(path)
    assert len(parses) == 3  # it may have changed


def test_what_changed_just_now_or_is_refused_is_not_remembered(parses, write_jsonl):
    path = write_jsonl({"path": "a.wav", "caption": "rain"})
    for _ in range(2):
        read_manifest(path)
    assert len(parses) == 2
    settled(path).write_text("{}")
    settled(path)
    for _ in range(2):
        with pytest.raises(ManifestError, match="line 1: `path` must be text"):
            read_manifest(path)
    assert len(parses) == 4


def test_where_nothing_can_be_remembered_it_is_parsed(parses, write_jsonl, tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    path = settled(write_jsonl({"path": "a.wav", "caption": "rain"}))
    assert [read_manifest(path)[0].id for _ in range(2)] == ["a.wav"] * 2
    assert "nothing is remembered in" in caplog.text


def test_a_damaged_memory_is_made_anew(parses, write_jsonl, tmp_path):
    path = settled(write_jsonl({"path": "a.wav", "caption": "rain"}))
    read_manifest(path)
    (file,) = (tmp_path / "cache" / "manifests").glob("*.safetensors")
    file.write_bytes(b"damaged")
    assert read_manifest(path)[0].caption == "rain"
    assert len(parses) == 2
    assert Columns(file).texts("caption")[0] == "rain"


def test_of_processes_at_once_one_parses_and_the_others_wait(parses, write_jsonl):
    path = settled(write_jsonl(*({"path": f"{n}.wav", "caption": "rain"} for n in range(500))))
    start, read = Barrier(4), []

    def process() -> None:
        start.wait()
        read.append(read_manifest(path))

    threads = [Thread(target=process) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert parses == [path]
    assert [entries == read[0] for entries in read] == [True] * 4


def test_one_that_waits_too_long_parses_itself(parses, write_jsonl, monkeypatch, caplog):
    monkeypatch.setattr(remembered, "_PATIENCE_SECONDS", 0.0)
    path = settled(write_jsonl({"path": "a.wav", "caption": "rain"}))
    read_manifest(path)
    file = next(Path(os.environ["FOLEY_CACHE"], "manifests").glob("*.safetensors"))
    file.unlink()
    with remembered.first_process(file) as held:
        assert held
        assert read_manifest(path)[0].id == "a.wav"
    assert not file.exists()
    assert "nothing is remembered" in caplog.text


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_arrays_and_join_and_split_as_rows_do(tmp_path):
    """Captions of one clip lie far apart, chunks that are read at once between them."""
    path = tmp_path / "clips.jsonl"
    rows = (
        {"path": f"{n % (MANY - 1)}.wav", "caption": f"caption {n}", "id": str(n % (MANY - 1))} for n in range(MANY)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = read_manifest(path)
    assert len(entries) == MANY - 1
    assert entries[0].other_captions == (f"caption {MANY - 1}",)
    assert entries[1].other_captions == ()
    numbers = sum(column.nbytes for column in entries.table.values() if isinstance(column, np.ndarray))
    assert numbers == (MANY - 1) * (8 + 8 + 1)  # a duration, a line, a split
    split = hold_out(entries, 0.1, tmp_path, "clips")
    held = of_split(split, "valid", path)
    assert len(held) == np.count_nonzero(split.split_codes == 2)
    assert 0.09 < len(held) / MANY < 0.11
    one = held[5]
    assert hold_out([one.__class__(one.path, "x", "x"), entries[0]], 0.1, tmp_path, "two")[0].split == "val"


def test_one_clip_may_be_named_by_a_longer_path_and_no_other_in_the_same_id(tmp_path):
    """As before there were columns: paths are compared as the system reads them."""
    path = tmp_path / "clips.jsonl"
    rows = [{"path": name, "caption": name, "id": "one"} for name in ("a/b.wav", "a//b.wav", "./a/b.wav")]
    path.write_text("\n".join(map(json.dumps, rows)))
    (clip,) = read_manifest(path)
    assert (clip.path, clip.other_captions) == (tmp_path / "a" / "b.wav", ("a//b.wav", "./a/b.wav"))
    path.write_text(
        "\n".join(map(json.dumps, [*rows, rows[0] | {"path": "b.wav", "caption": "x"}, rows[0] | {"label": "x"}]))
    )
    with pytest.raises(
        ManifestError, match=r"(?s)2 wrong lines.*line 4: duplicate id 'one', first used on line 1.*line 5: dup"
    ):
        read_manifest(path)


READS_ALL = """
import gc, os, sys
from pathlib import Path
from foley.data.manifest import read_manifest

def private_dirty(of=""):
    counted, total = False, 0
    for row in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in row.split()[0]:  # the range of a mapping, and its file
            counted = of in row
        elif counted and row.startswith("Private_Dirty:"):
            total += 1024 * int(row.split()[1])
    return total

path = sys.argv[1]
read_manifest(path)  # parses, and remembers
entries = read_manifest(path)
gc.freeze()
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
before = private_dirty()
letters = sum(len(entries[place].caption) for place in range(0, len(entries), 10))  # on every page
grown, is_mapped = private_dirty() - before, ".safetensors" in Path("/proc/self/smaps").read_text()
print(len(entries), 10 * letters, grown, private_dirty(".safetensors"), int(is_mapped), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_a_loader_process_copies_nothing_of_what_it_reads(tmp_path):
    """In a process of its own: what tests before this one have left in memory would be counted too."""
    path, words = tmp_path / "clips.jsonl", "rain " * 60
    path.write_text("".join(json.dumps({"path": f"{n}.wav", "caption": words}) + "\n" for n in range(MANY)))
    environment = os.environ | {"FOLEY_CACHE": str(tmp_path / "cache")}
    read = subprocess.run(
        [sys.executable, "-c", READS_ALL, str(settled(path))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    count, letters, copied, of_the_file, is_mapped = map(int, read.stdout.split())
    assert count == MANY
    assert letters > 290 * MANY
    assert is_mapped
    assert of_the_file == 0
    assert copied < letters / 4  # of 30 MB of captions


def test_names_of_files_that_are_no_text_are_kept():
    name = os.fsdecode(b"b\xe4r.wav")
    entries = Entries.of([ManifestEntry(Path(name), "", name), entry(1)])
    assert (entries[0].id, entries[0].path) == (name, Path(name))
