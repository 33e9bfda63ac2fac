"""Shards: what is written is what is read, wherever it lies; damage is named; nothing half-written is ever read."""

import io
import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import torch

from foley.core.locks import FolderInUseError
from foley.data import shards_writer
from foley.data.audio import AudioError
from foley.data.dataset import AudioDataset, DataFaultError
from foley.data.manifest import read_manifest
from foley.data.shards import ShardError, ShardIndex, ShardSource
from foley.data.shards_writer import write_shards
from foley.data.splits import ClipSource, shard_splits

RATE = 24000


@pytest.fixture
def entries(write_clip, write_jsonl):
    """Nine clips of 0.1 to 0.5 s, the last two for validation."""
    rows = []
    for index in range(9):
        path = write_clip(f"{'x' * index}_.wav", RATE // 10 + 1200 * index)
        split = "val" if index > 6 else ""
        rows.append({"path": path.name, "caption": f"a sound, the {index}ᵗʰ", "id": f"clip/{index}.é", "split": split})
    return read_manifest(write_jsonl(*rows))


@pytest.fixture
def folder(entries, tmp_path):
    write_shards(entries, str(tmp_path / "shards"), RATE)
    return tmp_path / "shards"


def test_clips_come_back_as_they_were(entries, folder):
    splits = shard_splits(str(folder), RATE, check_hashes=True)
    assert {name: len(source) for name, source in splits.items()} == {"train": 7, "val": 2}
    for split, first, count in (("train", 0, 7), ("val", 7, 2)):
        originals = ClipSource(entries[first : first + count], RATE)
        for index in range(count):
            item, original = splits[split].render(index, 0), originals.render(index, 0)
            torch.testing.assert_close(item.audio, original.audio, atol=2**-16, rtol=0)
            assert (item.caption, item.id) == (original.caption, original.id)
    assert splits["val"].durations_seconds(0) == pytest.approx([0.45, 0.5])
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".jsonl", ".safetensors", ".tar", ".tar"]


def test_several_captions_travel_with_their_clip(entries, tmp_path):
    write_shards([replace(entries[0], other_captions=("two", "three")), entries[1]], str(tmp_path / "shards"), RATE)
    source = shard_splits(str(tmp_path / "shards"), RATE)["train"]
    assert [source.render(index, 0).other_captions for index in (0, 1)] == [("two", "three"), ()]


def test_small_shards_hold_the_same_clips_as_large_ones(entries, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_writer, "_BYTES_PER_MEGABYTE", 10_000)
    small = write_shards(entries, str(tmp_path / "small"), RATE, shard_megabytes=2)
    assert len(small.shards) > 3
    index = json.loads((tmp_path / "small/index.json").read_text())
    assert (index["num_samples"], index["left_out"]) == (9, 0)
    assert index["seconds"] == pytest.approx(sum(0.1 + 0.05 * i for i in range(9)))
    for split in ("train", "val"):
        few, many = ShardSource(ShardIndex.read(str(folder)), split), ShardSource(small, split)
        assert len(few) == len(many)
        assert all(torch.equal(few.render(i, 0).audio, many.render(i, 0).audio) for i in range(len(few)))


def test_the_webdataset_library_reads_the_tars(entries, folder):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in samples] == [entry.id for entry in entries[:7]]
    for sample, entry in zip(samples, entries, strict=False):
        audio, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        assert rate == RATE
        np.testing.assert_allclose(audio, soundfile.read(entry.path, dtype="float32")[0], atol=2**-16)


def test_the_same_clips_give_the_same_bytes_with_any_number_of_processes(entries, folder, tmp_path):
    write_shards(entries, str(tmp_path / "again"), RATE, num_workers=2)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_samples_beyond_1_and_other_rates_survive(tmp_path, write_jsonl):
    loud = np.sin(np.arange(800) / 20) * 3
    soundfile.write(tmp_path / "loud.wav", np.stack([loud, loud], 1), 8000, subtype="FLOAT")
    entries = read_manifest(write_jsonl({"path": "loud.wav", "caption": "loud"}))
    kept = write_shards(entries, str(tmp_path / "own"), None, subtype="PCM_24")
    np.testing.assert_allclose(ShardSource(kept, "train", 8000).render(0, 0).audio, loud, atol=1e-6)
    own = ClipSource(entries, RATE).render(0, 0).audio
    torch.testing.assert_close(ShardSource(kept, "train", RATE).render(0, 0).audio, own, atol=1e-5, rtol=0)
    assert len(ShardSource(kept, "train", RATE, 0.05).render(0, 0).audio) == 1200


class _Ranges(BaseHTTPRequestHandler):
    """Serves the files below `server.folder`, whole or by range."""

    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        content, wanted = path.read_bytes(), self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            content = content[start : end + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def address(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    server.folder = folder
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_any_url_reads_and_writes(entries, folder, address):
    fsspec.filesystem("memory").rm("/", recursive=True)
    write_shards(entries, "memory://bucket/shards", RATE)
    expected = ShardSource(ShardIndex.read(str(folder)), "train")
    for url in ("memory://bucket/shards", "simplecache::memory://bucket/shards", address):
        source = shard_splits(url, RATE, check_hashes=True)["train"]
        assert all(torch.equal(source.render(i, 0).audio, expected.render(i, 0).audio) for i in range(7)), url


def test_loader_processes_read_over_http(folder, address):
    dataset = AudioDataset(shard_splits(address, RATE)["train"], 100)
    dataset[0]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert [item.id for item in loader] == [f"clip/{index}.é" for index in range(7)]


def test_faulty_clips_are_left_out_counted_and_listed(entries, tmp_path):
    entries[1].path.unlink()
    entries[3].path.write_bytes(b"")
    index = write_shards(entries, str(tmp_path / "out"), RATE, max_fault_fraction=0.3)
    assert (index.left_out, len(ShardSource(index, "train"))) == (2, 5)
    listed = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == ["clip/1.é", "clip/3.é"]
    assert "does not exist" in listed[0]["reason"]


def test_too_many_faulty_clips_a_full_disk_and_a_kill_leave_nothing_to_read(entries, tmp_path, monkeypatch):
    output = tmp_path / "out"
    for entry in entries[:2]:
        entry.path.unlink()
    with pytest.raises(DataFaultError, match=r"2 of 9 clips cannot be used"):
        write_shards(entries, str(output), RATE)
    assert not output.exists()

    def refuse(source, target):
        Path(target).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards_writer.shutil, "copyfile", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_shards(entries[2:], str(output), RATE)
    assert list(output.iterdir()) == []
    (output / "train-000000.tar").write_bytes(b"part")  # what a killed job may leave
    with pytest.raises(ShardError, match=r"holds no complete shards.*make_shards\.py"):
        shard_splits(str(output), RATE)
    write_shards(entries[2:], str(output), RATE)
    assert len(shard_splits(str(output), RATE, check_hashes=True)["train"]) == 5


def test_older_shards_are_not_overwritten_and_splits_stay_in_the_folder(entries, folder, tmp_path):
    with pytest.raises(ShardError, match="holds shards already"):
        write_shards(entries, str(folder), RATE)
    with pytest.raises(ShardError, match=r"split '\.\./up' cannot"):
        write_shards([replace(entries[0], split="../up")], str(tmp_path / "new"), RATE)


def _damage(path: Path, at: int = 5000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_every_missing_truncated_or_changed_shard_is_named(folder):
    train, val = folder / "train-000000.tar", folder / "val-000000.tar"
    _damage(train)
    shard_splits(str(folder), RATE)
    with pytest.raises(ShardError, match=r"1 of 2 shards.*\n  train-000000\.tar: its SHA-256 is not"):
        shard_splits(str(folder), RATE, check_hashes=True)
    os.truncate(train, 4000)
    val.unlink()
    with pytest.raises(ShardError, match=r"(?s)2 of 2.*train-000000\.tar: holds 4000 of \d+.*val.*does not exist"):
        shard_splits(str(folder), RATE)


def test_damaged_clips_are_skipped_and_an_absent_shard_stops_the_run(folder):
    source = shard_splits(str(folder), RATE)["train"]
    os.truncate(folder / "train-000000.tar", int(source.index.samples["offset"][5]) + 100)
    with pytest.raises(AudioError, match=r"train-000000\.tar#6: the shard ends early: 0 of"):
        source.render(6, 0)
    dataset = AudioDataset(source, 100, max_fault_fraction=0.5)
    assert dataset[5].id == "clip/0.é"
    assert len(dataset.faults) == 2
    _damage(folder / "train-000000.tar", int(source.index.samples["offset"][0]))
    assert dataset[0].id == "clip/1.é"
    assert len(dataset.faults) == 3
    (folder / "train-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000000\.tar cannot be read"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.json", b"{", "not valid JSON"),
        ("index.json", b'{"format": "other"}', "not of the format"),
        ("index.json", b"[" * 100_000, "not valid JSON"),
        ("index.json", b"[]", "the index of shards"),
        ("index.json", b'{"format": "foley-shards-1"}', "it lacks the entry 'samples_sha256'"),
        ("samples.safetensors", b"changed", "is not the one of"),
    ],
)
def test_a_damaged_index_is_refused(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ShardError, match=message):
        ShardIndex.read(str(folder))


def test_a_second_writer_is_refused_and_mixes_nothing(entries, tmp_path, monkeypatch):
    output, encoded = str(tmp_path / "out"), shards_writer._encoded

    def meanwhile(clips, num_workers):
        with monkeypatch.context() as patch:
            patch.setattr(shards_writer, "_encoded", encoded)
            with pytest.raises(FolderInUseError, match="the shards of"):
                write_shards(entries[:3], output, RATE)
        return encoded(clips, num_workers)

    monkeypatch.setattr(shards_writer, "_encoded", meanwhile)
    write_shards(entries, output, RATE)
    assert {name: len(source) for name, source in shard_splits(output, RATE).items()} == {"train": 7, "val": 2}
    assert not (tmp_path / ".out.partial").exists()


def test_an_unknown_split_names_the_known_ones(folder):
    with pytest.raises(ShardError, match=r"no split 'test', only \['train', 'val'\]"):
        ShardSource(ShardIndex.read(str(folder)), "test")
