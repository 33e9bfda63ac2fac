"""Encoding that is stopped, shared out, continued and merged: every clip is in the cache once, whatever happened."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from foley.core.config import PROJECT_ROOT
from foley.core.locks import FolderInUseError
from foley.core.seeding import torch_generator
from foley.core.sharding import Shard
from foley.data import latent_folder
from foley.data.audio import AudioError
from foley.data.dataset import AudioDataset, AudioItem, DataFaultError, clip_name
from foley.data.encoding import EncodingOptions, clip_keys, encode_latents
from foley.data.latent_folder import LatentFolder, clip_key, latent_sums
from foley.data.latent_format import LatentCacheError, LatentEntry, LatentLayout
from foley.data.latents import LatentCacheIndex, LatentDataset
from foley.data.splits import MixtureSource

RATE, HOP = 1000, 10
FRAME_BYTES = 2 * 2 * HOP
SMALL = EncodingOptions(batch_size=4, shard_megabytes=40 * FRAME_BYTES / 2**20)  # a shard for two clips of 20 frames


class Codec(nn.Module):
    """The mean is the HOP samples of a frame times a weight, the deviation constant; `fail` is called with each batch.

    `seen` counts clips by their first sample, which names them.
    """

    sample_rate_hz = RATE
    hop_samples = HOP

    def __init__(self, weight=2.0, fail=lambda: None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.fail, self.seen = fail, Counter()

    def posterior(self, audio):
        self.fail()
        self.seen.update(audio[:, 0, 0].tolist())
        mean = audio.unflatten(-1, (-1, HOP)).squeeze(1).transpose(1, 2) * self.weight
        return SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.05))


class Clips:
    """Clips by their names; `faults` are what happens instead of some of them."""

    sample_rate_hz = RATE

    def __init__(self, names, faults=None, length=200):
        self.names, self.faults, self.length = list(names), faults or {}, length

    def __len__(self):
        return len(self.names)

    def clip_name(self, index):
        return self.names[index]

    def render(self, index, epoch):
        name = self.names[index]
        fault = self.faults.get(name)
        if isinstance(fault, Exception):
            raise fault
        audio = sound(name, self.length) if fault is None else fault
        return AudioItem(audio, f"caption of {name}", "label", name)


def sound(name, length=200):
    return 0.2 * torch.randn(length, generator=torch_generator(name))


def names(count, start=0):
    return [f"clip {number:03d}" for number in range(start, start + count)]


def encode(folder, train=None, options=SMALL, codec=None, val=None, **more):
    sources = {"train": Clips(names(30)) if train is None else train, "val": val or Clips(["v0", "v1", "v2"])}
    clips = {
        split: AudioDataset(source, 500, random_crop=False, max_fault_fraction=0.5) for split, source in sources.items()
    }
    return encode_latents(codec or Codec(), clips, folder, options, **more)


def content(folder):
    """By split and id: caption and latent, as they are kept."""
    index = LatentCacheIndex.read(folder)
    datasets = [LatentDataset(index, split, 10**6, random=False) for split in index.splits]
    items = [
        (split, data[place]) for split, data in zip(index.splits, datasets, strict=True) for place in range(len(data))
    ]
    found = {(split, item.id): (item.caption, item.latent) for split, item in items}
    assert len(found) == len(items) == len(index.clips)
    return found


def assert_same(folder, other):
    one, two = content(folder), content(other)
    assert one.keys() == two.keys()
    for key, (caption, latent) in one.items():
        assert caption == two[key][0]
        assert torch.equal(latent, two[key][1])
    first, second = LatentCacheIndex.read(folder), LatentCacheIndex.read(other)
    assert np.allclose(first.latent_mean, second.latent_mean, rtol=1e-12, atol=1e-15)
    assert np.allclose(first.latent_std, second.latent_std, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    assert encode(folder)
    return folder


class Stopped(BaseException):
    """Nothing that anybody catches."""


def test_stopped_at_ten_moments_it_goes_on_and_encodes_nothing_again(tmp_path, undisturbed):
    moments, cache, folder = random.Random(0), tmp_path / "cache", LatentFolder(str(tmp_path / "cache"))
    stops = 0
    for error in [Stopped, RuntimeError, KeyboardInterrupt, OSError, MemoryError] * 2:
        left = [moments.randrange(1, 3)]

        def fail(error=error, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise error("stopped")

        done, codec = set(folder.encoded().tolist()), Codec(fail=fail)
        try:
            encode(cache, codec=codec)
        except error:
            stops += 1
        again = {clip_key("train", name) for name in names(30) if float(sound(name)[0]) in codec.seen}
        assert not again & done
        assert set(folder.encoded().tolist()) >= done
    assert stops >= 5
    assert encode(cache)
    assert_same(cache, undisturbed)


@pytest.mark.parametrize("place", ["write_shard", "write_index"])
def test_a_fault_while_files_are_written_loses_nothing_that_was_finished(tmp_path, undisturbed, monkeypatch, place):
    write, count = getattr(latent_folder, place), [0]

    def failing(*args):
        count[0] += 1
        if count[0] in (1, 4, 5):
            raise OSError("the disk is full")
        return write(*args)

    monkeypatch.setattr(latent_folder, place, failing)
    for _ in range(4):
        try:
            encode(tmp_path / "cache")
        except OSError:
            assert not (tmp_path / "cache/index.json").exists()
    assert_same(tmp_path / "cache", undisturbed)
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")} == set()


def test_parts_of_any_number_complete_one_cache_and_the_last_of_them_merges(tmp_path, undisturbed):
    cache = tmp_path / "cache"
    assert [encode(cache, options=replace(SMALL, share=Shard(part, 3))) for part in (2, 0)] == [False, False]
    assert not (cache / "index.json").exists()
    codec = Codec()
    assert not encode(cache, options=replace(SMALL, share=Shard(0, 2)), codec=codec)
    assert encode(cache, options=replace(SMALL, share=Shard(1, 2)), codec=codec)
    assert codec.seen.total() == 11
    assert_same(cache, undisturbed)
    ranks = {path.name.split("-")[1] for path in cache.glob("latents-*")}
    assert ranks == {"00000", "00001", "00002"}


class Ranks:
    """Processes of one launch, as threads."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size, timeout=60).wait
        self.said = None

    def of(self, rank, world_size):
        return SimpleNamespace(
            global_rank=rank, world_size=world_size, barrier=self.barrier, broadcast=self._broadcast(rank)
        )

    def _broadcast(self, rank):
        def broadcast(value, source=0):
            if rank == source:
                self.said = value
            self.barrier()
            said = self.said
            self.barrier()  # before the next one speaks
            return said

        return broadcast


def test_what_clips_are_is_said_of_all_processes(tmp_path, caplog):
    """Not of the first one's share alone: here 30 silent clips, 15 of them of the second process."""
    train, ranks = Clips(names(30), dict.fromkeys(names(30), torch.zeros(200))), Ranks(2)
    threads = [
        threading.Thread(target=encode, args=(tmp_path, train), kwargs={"processes": ranks.of(rank, 2)})
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = {record.getMessage() for record in caplog.records if "silent" in record.getMessage()}
    (line,) = said
    assert line.startswith("train: 30 clips are silent")
    assert line.endswith("...")


def test_processes_share_what_is_left_evenly(tmp_path, undisturbed):
    cache, codecs, said = tmp_path / "cache", [Codec(), Codec()], [None, None]
    encode(cache, options=replace(SMALL, share=Shard(0, 3)))
    ranks = Ranks(2)

    def run(rank):
        said[rank] = encode(cache, codec=codecs[rank], processes=ranks.of(rank, 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [True, True]
    assert [codec.seen.total() for codec in codecs] == [11, 11]
    assert_same(cache, undisturbed)


def test_loader_processes_change_nothing(tmp_path, undisturbed):
    encode(tmp_path / "cache", Clips(names(30), {}), replace(SMALL, num_workers=2))
    assert_same(tmp_path / "cache", undisturbed)


def test_a_clip_that_two_ranks_have_encoded_is_in_once(tmp_path, undisturbed):
    cache, other = tmp_path / "cache", tmp_path / "other"
    encode(cache, options=replace(SMALL, share=Shard(0, 2)))
    encode(other, options=replace(SMALL, batch_size=3, shard_megabytes=1))
    (shard,) = other.glob("latents-*")
    (cache / "latents-00007-00000.safetensors").write_bytes(shard.read_bytes())
    assert encode(cache, options=replace(SMALL, share=Shard(1, 2)))
    assert_same(cache, undisturbed)


BAD = {
    "clip 003": AudioError("3.wav", "is faulty"),
    "clip 007": torch.full((200,), float("nan")),
    "clip 011": torch.full((200,), 0.9),  # 0.9 times the codec's weight is beyond float16
}


def test_clips_of_no_use_are_left_out_with_their_reasons_and_tried_again_when_mended(tmp_path, undisturbed):
    cache, codec = tmp_path / "cache", lambda: Loud(2.0)
    encode(cache, Clips(names(30), BAD), codec=codec())
    rows = [json.loads(line) for line in (cache / "left_out.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons.keys() == BAD.keys()
    assert reasons["clip 003"] == "3.wav: is faulty"
    assert "clip 011: has a latent that float16 cannot hold" in reasons["clip 011"]
    index = LatentCacheIndex.read(cache)
    assert (len(index.clips), index.left_out) == (30, 3)
    before = {path.name for path in cache.iterdir()}
    assert encode(cache, codec=codec())
    assert {path.name for path in cache.iterdir()} == before == {"request.json", "clips.safetensors", *before}
    (cache / "index.json").unlink()  # it is complete no longer: what was left out is tried again
    assert encode(cache, codec=codec())
    assert (cache / "left_out.jsonl").read_text() == ""
    assert_same(cache, undisturbed)


class Loud(Codec):
    """Clips that are 0.9 throughout are beyond float16."""

    def posterior(self, audio):
        found = super().posterior(audio)
        beyond = (audio == 0.9).all(-1, keepdim=True)
        found.mean = torch.where(beyond, torch.tensor(1e6), found.mean)
        return found


def test_too_many_clips_of_no_use_end_it_and_what_was_encoded_stays(tmp_path):
    clips = Clips(names(30), {name: AudioError(name, "is faulty") for name in names(16, 14)})
    cache = tmp_path / "cache"
    with pytest.raises(DataFaultError, match=r"16 of 30 clips cannot be used.*data\.max_fault_fraction"):
        encode(cache, clips, replace(SMALL, batch_size=1))
    assert len(LatentFolder(str(cache)).encoded()) == 13  # a batch is kept when the next one is on the device


def test_each_part_may_lose_few_and_all_of_them_too_many(tmp_path):
    clips = Clips(names(30), {name: AudioError(name, "is faulty") for name in names(16, 14)})
    assert not encode(tmp_path / "cache", clips, replace(SMALL, share=Shard(0, 2)))
    with pytest.raises(DataFaultError, match="16 of 30 clips"):
        encode(tmp_path / "cache", clips, replace(SMALL, share=Shard(1, 2)))
    assert not (tmp_path / "cache/index.json").exists()


REQUESTS = {
    "another codec": ({"codec": Codec(3.0)}, "codec_hash was"),
    "another store": ({"options": replace(SMALL, store="mean")}, "store was mean_std, is mean"),
    "other windows": ({"options": replace(SMALL, windows="all")}, "windows was first, is all"),
    "longer clips": ({"options": replace(SMALL, min_duration_seconds=0.3)}, r"min_duration_seconds was 0\.0, is 0\.3"),
    "other clips": ({"train": Clips(names(5, 100)), "val": Clips(["w"])}, "latents of other clips"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_another_request_is_refused_until_it_may_overwrite(tmp_path, case):
    cache, (request, message) = tmp_path / "cache", REQUESTS[case]
    encode(cache, Clips(names(5)))
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(LatentCacheError, match=f"{message}.*overwrite=true"):
        encode(cache, **{"train": Clips(names(5)), **request})
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    options = replace(request.get("options", SMALL), overwrite=True)
    assert encode(cache, **{"train": Clips(names(5)), **request, "options": options})
    assert {entry.id for entry in LatentCacheIndex.read(cache).entries if entry.split == "train"} == {
        *request.get("train", Clips(names(5))).names
    }


def test_what_is_not_a_cache_of_ours_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(LatentCacheError, match="not a latent cache; choose another output_dir"):
            encode(tmp_path, options=replace(SMALL, overwrite=overwrite))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/latents-00000.safetensors").touch()
    with pytest.raises(LatentCacheError, match=r"no request\.json that says how they were encoded"):
        encode(tmp_path / "old")
    assert encode(tmp_path / "old", options=replace(SMALL, overwrite=True))
    assert not (tmp_path / "old/latents-00000.safetensors").exists()


def test_clips_that_are_new_are_added_and_clips_that_are_gone_are_dropped(tmp_path, undisturbed):
    cache, codec = tmp_path / "cache", Codec()
    encode(cache, Clips(names(20, 15)))
    assert encode(cache, codec=codec)
    assert codec.seen.total() == 15  # of thirty
    assert_same(cache, undisturbed)


def test_clips_that_were_gone_and_came_back_are_in_the_index_again(tmp_path, undisturbed):
    cache, codec = tmp_path / "cache", Codec()
    for count in (30, 20):
        encode(cache, Clips(names(count)))
        assert len(LatentCacheIndex.read(cache).clips) == count + 3
    assert encode(cache, codec=codec)
    assert not codec.seen
    assert_same(cache, undisturbed)


def test_a_folder_of_a_lock_that_cannot_be_removed_ends_no_encoding(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError("the folder is not empty")

    monkeypatch.setattr(os, "rmdir", refuse)  # as over NFS, where a file that is open leaves another behind
    assert encode(tmp_path / "cache")
    assert encode(tmp_path / "cache", Clips(names(31)))
    assert len(content(tmp_path / "cache")) == 34


def test_a_complete_cache_is_left_as_it_is(tmp_path):
    codec = Codec()
    encode(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert encode(tmp_path / "cache", codec=codec)
    assert not codec.seen
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_a_second_process_of_the_same_part_is_refused(tmp_path):
    def begin_again():
        for overwrite in (False, True):
            with pytest.raises(FolderInUseError, match="another process is writing the latents of"):
                encode(tmp_path / "cache", options=replace(SMALL, overwrite=overwrite))

    assert encode(tmp_path / "cache", codec=Codec(fail=begin_again))


def test_any_url_takes_a_cache(undisturbed):
    url = "memory://encoding/cache"
    assert not encode(url, options=replace(SMALL, share=Shard(0, 2)))
    assert encode(url, options=replace(SMALL, share=Shard(1, 2)))
    assert_same(url, undisturbed)
    files = {Path(path).name for path in fsspec.filesystem("memory").ls("/encoding/cache", detail=False)}
    assert {"request.json", "index.json", "clips.safetensors", "left_out.jsonl"} < files
    with pytest.raises(LatentCacheError, match="codec_hash was"):
        encode(url, codec=Codec(3.0))
    assert encode(url, codec=Codec(3.0), options=replace(SMALL, overwrite=True))


@pytest.mark.parametrize("store", ["mean", "sample"])
def test_a_latent_alone_takes_half_the_bytes_and_has_statistics_of_its_own(tmp_path, store, undisturbed):
    cache = tmp_path / "cache"
    encode(cache, options=replace(SMALL, store=store))
    one, two = content(cache), content(undisturbed)
    differences = torch.stack([latent - two[key][1] for key, (_, latent) in one.items()])
    assert float(differences.std()) == pytest.approx(0.05 if store == "sample" else 0.0, abs=0.005)
    index = LatentCacheIndex.read(cache)
    assert sum(shard.rows * index.layout.frame_bytes for shard in index.shards) == 33 * 20 * FRAME_BYTES // 2
    rows = torch.cat([latent for (split, _), (_, latent) in one.items() if split == "train"], 1).double()
    assert np.allclose(index.latent_mean, rows.mean(1))
    assert np.allclose(index.latent_std, rows.std(1, correction=0))
    again = tmp_path / "again"
    encode(again, options=replace(SMALL, store=store, batch_size=7))
    assert_same(cache, again)


def test_all_windows_of_a_clip_are_in_one_shard(tmp_path):
    options = replace(SMALL, windows="all", batch_size=2)
    encode(tmp_path / "cache", Clips(["long", *names(3)], {"long": torch.linspace(-1, 1, 2300)}), options)
    entries = [entry for entry in LatentCacheIndex.read(tmp_path / "cache").entries if entry.id.startswith("long")]
    assert [entry.id for entry in entries] == [f"long#{start:.2f}s" for start in (0, 0.5, 1, 1.5, 1.8)]
    assert len({entry.shard for entry in entries}) == 1


def test_a_mixture_s_clip_is_encoded_once_and_clips_of_one_id_are_two(tmp_path):
    mixture = MixtureSource([Clips(names(3)), Clips(names(3), length=300)], [3, 1], 8)
    assert mixture.shares == [6, 2]
    encode(tmp_path / "cache", mixture)
    entries = [entry for entry in LatentCacheIndex.read(tmp_path / "cache").entries if entry.split == "train"]
    assert Counter(entry.num_frames for entry in entries) == {20: 3, 30: 2}
    assert len({clip_name(mixture, index) for index in range(8)}) == 5


@pytest.mark.parametrize(
    ("precision", "seen"), [("float32", (False, False)), ("tf32", (True, False)), ("bf16", (False, True))]
)
def test_the_codec_runs_in_the_precision_asked_for(tmp_path, precision, seen):
    found, before = set(), torch.backends.cudnn.allow_tf32

    def look():
        found.add((torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")))

    encode(tmp_path / "cache", codec=Codec(fail=look), options=replace(SMALL, precision=precision))
    assert found == {seen}
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": "some"}, "windows=some: give first or all"),
        ({"store": "std"}, "store=std: give mean_std or mean or sample"),
        ({"precision": "int8"}, "precision=int8"),
        ({"shard_minutes": 0}, "shard_minutes=0"),
        ({"overwrite": True, "share": Shard(0, 2)}, "overwrite=true with shards>1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncodingOptions(**options)


def test_a_writer_holds_a_shard_and_not_more_and_writes_it_in_time(tmp_path, monkeypatch):
    folder, now = LatentFolder(str(tmp_path)), [0.0]
    monkeypatch.setattr(latent_folder, "time", SimpleNamespace(monotonic=lambda: now[0]))
    held = []
    entry = LatentEntry("", "", "", "train", "", 0, 0, 1.0)
    with folder.writer(
        3, lambda channels: LatentLayout("c", RATE, HOP, channels, "mean", ("train",)), 500 / 2**20, 2
    ) as writer:
        for number in range(200):
            writer.add(str(number), [(entry, torch.ones(10, 1, 2).half())])  # 40 bytes
            held.append(len(writer._entries))
        for _ in range(3):
            now[0] += 60.0
            writer.add(str(now[0]), [(entry, torch.ones(10, 1, 2).half())])
            held.append(len(writer._entries))
    assert max(held) == 12
    assert held[-3:] == [6, 0, 1]
    assert [path.name for path in sorted(tmp_path.glob("latents-*"))][-1] == "latents-00003-00016.safetensors"
    assert len(folder.encoded()) == 203


@pytest.mark.slow
def test_a_hundred_thousand_clips_cost_what_their_numbers_do():
    class Named:
        sample_rate_hz = RATE

        def __len__(self):
            return 100_000

        def clip_name(self, index):
            return f"clip-{index}"

        def render(self, index, epoch):
            raise NotImplementedError

    datasets = {"train": AudioDataset(Named(), 100)}
    tracemalloc.start()
    keys = clip_keys(datasets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(keys)) == 100_000
    assert peak < 2 * keys.nbytes
    assert keys[7] == clip_key("train", "clip-7")


def test_sums_of_parts_are_those_of_the_whole():
    latent = torch.randn(50, 2, 4, generator=torch_generator("sums")).half()
    parts = sum(latent_sums(part) for part in latent.split(7))
    assert torch.allclose(parts, latent_sums(latent), rtol=1e-13)
    mean, square = latent_sums(latent) / 50
    double = latent.double()
    expected = double[:, 0].var(0, correction=0) + double[:, 1].square().mean(0)
    assert torch.allclose(square - mean.square(), expected, rtol=1e-12)


def test_killed_at_ten_moments_it_goes_on_and_has_nothing_twice(tmp_path, undisturbed):
    moments, cache, fork = random.Random(1), tmp_path / "cache", multiprocessing.get_context("fork")
    encoded = 0
    for _ in range(10):
        batches, wanted = fork.Value("i", 0), moments.randrange(1, 5)

        def count(batches=batches):
            time.sleep(0.01)
            batches.value += 1

        life = fork.Process(target=encode, args=(cache, None, replace(SMALL, batch_size=1), Codec(fail=count)))
        life.start()
        while batches.value < wanted and life.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        life.kill()
        life.join()
        before, encoded = encoded, len(LatentFolder(str(cache)).encoded())
        assert encoded >= before
    assert encoded > 0
    (cache / ".latents-00000-00009.safetensors.part").touch()  # what was being written
    assert encode(cache)
    assert_same(cache, undisturbed)
    assert not list(cache.glob(".*"))


@pytest.mark.slow
def test_the_command_encodes_on_two_processes(tmp_path):
    """Real ones, over gloo: half of the clips are in the shards of each, and what they are is said of both."""
    (tmp_path / "clips").mkdir()
    for number in range(10):
        sound_of_it = np.zeros(24_000) if number % 2 else sound(str(number), 24_000).numpy()
        soundfile.write(tmp_path / "clips" / f"{number}.wav", sound_of_it, 24_000)
    command = [sys.executable, PROJECT_ROOT / "scripts" / "encode_latents.py", "codec_path=data/demo/codec"]
    data = ["data=folder", f"data.splits.folder={tmp_path / 'clips'}", "data.duration_seconds=1"]
    cache, processes = tmp_path / "cache", ["trainer=ddp_cpu", "trainer.devices=2"]
    options = [f"output_dir={cache}", f"hydra.run.dir={tmp_path / 'run'}"]
    ended = subprocess.run(
        [*command, *data, *processes, *options], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert "train: 5 clips are silent" in ended.stdout + ended.stderr
    shards = sorted(file.name for file in cache.glob("latents-*"))
    assert shards == [f"latents-{rank:05d}-00000.safetensors" for rank in (0, 1)]
    assert len(LatentCacheIndex.read(cache).clips) == 10
