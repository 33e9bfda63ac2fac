"""Shards of a work and the notes of them; folders and files at URLs."""

import json
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from foley.core import remote
from foley.core.remote import find_files, hash_of, local_file, local_folder, read_bytes, url_of
from foley.core.sharding import Shard, ShardNotes
from foley.data.audio import AudioError, read_audio
from foley.data.latents import read_captions
from foley.data.manifest import read_manifest
from foley.data.preparation import AudioFolder
from foley.metrics.features import scan_directory
from foley.metrics.references import read_clips


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("ranks", [1, 3])
def test_shards_and_their_ranks_have_every_item_once(count, ranks):
    items = list(range(23))
    parts = [Shard(number, count).split(rank, ranks) for number in range(count) for rank in range(ranks)]
    assert sorted(item for part in parts for item in part.of(items)) == items
    assert {(part.number, part.count) for part in parts} == {(n, count * ranks) for n in range(count * ranks)}
    for number in range(count):  # whatever the number of its ranks
        own = sorted(item for rank in range(ranks) for item in Shard(number, count).split(rank, ranks).of(items))
        assert own == Shard(number, count).of(items)
    assert np.array_equal(Shard(0, count).of(np.arange(23)), np.arange(0, 23, count))


@pytest.mark.parametrize(("given", "message"), [((3, 3), "shard=3: give a whole number >= 0 and <= 2"), ((0, 0), "=0")])
def test_a_shard_that_there_is_not_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Shard(*given)


@pytest.mark.parametrize("where", ["{}/out", "{}/run[1]", "file://{}/out", "memory://notes{}"])
def test_notes_are_of_one_request(tmp_path, where):
    url = where.format(tmp_path)
    notes = ShardNotes(url, {"seed": 0}, 2)
    assert notes.done() == set()
    notes.add(1)
    assert ShardNotes(url, {"seed": 0}, 2).done() == {1}
    assert ShardNotes(url, {"seed": 1}, 2).done() == ShardNotes(url, {"seed": 0}, 3).done() == set()
    assert not notes.are_complete
    notes.add(0)
    assert notes.are_complete
    notes.clear()
    assert notes.done() == set()


def test_paths_stand_for_urls():
    assert url_of(Path("sounds/a:b/c.wav")) is None
    assert url_of(Path("c:/sounds")) is None
    assert url_of(Path("file:///tmp/x") / "a.wav") == "file:///tmp/x/a.wav"
    assert url_of("gs://bucket/a b.wav") == "gs://bucket/a b.wav"


def test_a_folder_at_a_url_is_kept_in_step(tmp_path):
    url, files = f"memory://step{tmp_path}", fsspec.filesystem("memory")
    with local_folder(url) as folder:
        (folder / "deep").mkdir()
        (folder / "deep/a.txt").write_text("one")
        (folder / "b.txt").write_text("two")
        (folder / ".part").write_text("half")
    root = f"/step{tmp_path}"
    assert sorted(files.find(root)) == [f"{root}/b.txt", f"{root}/deep/a.txt"]
    with suppress(RuntimeError), local_folder(url, lambda name: name == "b.txt") as folder:
        assert [path.name for path in folder.iterdir()] == ["b.txt"]
        (folder / "b.txt").unlink()
        (folder / "c.txt").write_text("three")
        raise RuntimeError("what was written is there all the same")
    assert sorted(files.find(root)) == [f"{root}/c.txt", f"{root}/deep/a.txt"]
    with local_folder(str(tmp_path / "plain")) as folder:
        assert folder == tmp_path / "plain"


def test_a_url_that_is_away_for_a_while_is_tried_again(tmp_path, monkeypatch):
    publish, tries = remote._Mirror.publish, []

    def fail_first(mirror):
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("no route")
        publish(mirror)

    monkeypatch.setattr(remote, "_PUBLISH_SECONDS", 0.01)
    monkeypatch.setattr(remote._Mirror, "publish", fail_first)
    url, files = f"memory://away{tmp_path}", fsspec.filesystem("memory")
    with local_folder(url) as folder:
        (folder / "a.txt").write_text("one")
        patience = time.monotonic() + 10
        while not files.exists(f"/away{tmp_path}/a.txt") and time.monotonic() < patience:
            time.sleep(0.01)
        assert files.exists(f"/away{tmp_path}/a.txt")


def test_inputs_are_fetched_as_they_are_now(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    files, url = fsspec.filesystem("memory"), f"memory://inputs{tmp_path}"
    files.pipe(f"/inputs{tmp_path}/rows.jsonl", json.dumps({"id": 1}).encode())
    path = Path(url) / "rows.jsonl"
    kept = local_file(path)
    assert (kept.name, kept.read_bytes()) == ("rows.jsonl", read_bytes(path))
    assert local_file(path) == kept
    files.pipe(f"/inputs{tmp_path}/rows.jsonl", b"anew")
    assert local_file(path).read_bytes() == b"anew"
    assert find_files(Path(url)) == [path]
    assert hash_of(path) == hash_of(local_file(path))
    assert not local_file(Path(url) / "absent").is_file()
    assert local_file(f"file://{tmp_path}/x") == tmp_path / "x"


def test_recordings_and_their_table_may_lie_at_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    files, url = fsspec.filesystem("memory"), f"memory://sounds{tmp_path}"
    soundfile.write(tmp_path / "a.wav", np.linspace(-0.5, 0.5, 800), 8000)
    (tmp_path / "rows.jsonl").write_text('{"path": "a.wav", "caption": "a"}\n{"path": "b.wav", "caption": "b"}\n')
    for name in ("a.wav", "rows.jsonl"):
        files.pipe(f"/sounds{tmp_path}/{name}", (tmp_path / name).read_bytes())
    first, second = read_manifest(f"{url}/rows.jsonl")
    assert list(read_captions(f"{url}/rows.jsonl")) == ["a", "b"]
    assert np.array_equal(read_audio(first.path, 8000), read_audio(tmp_path / "a.wav", 8000))
    with pytest.raises(AudioError, match=r"b\.wav: the file does not exist"):
        read_audio(second.path, 8000)
    (clip,) = scan_directory(Path(url))
    assert (clip.id, read_clips(url)[0].path) == ("a", first.path)
    assert AudioFolder(Path(url)).find(["a"]) == "a.wav"
