"""The files of a latent cache: shards that describe themselves, tables that grow by bytes and not by objects."""

import gc
import os
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from latent_parts import many_clips, write_cache
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from foley.core.reading import DamagedFileError
from foley.data import latents
from foley.data.dataset import SampleKey
from foley.data.latent_format import LatentClips, LatentEntry, LatentLayout, read_shard, write_index, write_shard
from foley.data.latents import LatentCacheIndex, LatentDataset

SPLITS = ("train", "val")
LAYOUT = LatentLayout("c0dec", 1000, 10, 3, "mean_std", SPLITS)
MANY = 100_000


def few_clips() -> LatentClips:
    """Five clips out of order, of 4 frames each."""
    entries = [
        LatentEntry(id, f"captión {id}", "", split, "s", 4 * place, 4, 0.04, ("other",) * place)
        for place, (id, split) in enumerate(
            [("d", "train"), ("b", "val"), ("é", "train"), ("a", "val"), ("c", "train")]
        )
    ]
    return LatentClips.of(entries, SPLITS, ["s"])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a hundred thousand clips of two frames of one value."""
    folder = tmp_path_factory.mktemp("many") / "cache"
    layout = replace(LAYOUT, channels=1, store="mean")
    write_cache(folder, torch.zeros(2 * MANY, 1, 1), many_clips(MANY), layout)
    return folder


def test_a_shard_describes_itself(tmp_path: Path) -> None:
    clips = few_clips()
    shard = write_shard(tmp_path / "latents-00003-00001.safetensors", noise(20, 2, 3), clips, LAYOUT)
    layout, found, table = read_shard(str(tmp_path), shard.name, shard.bytes)
    assert (layout, found) == (LAYOUT, shard)
    assert (shard.rows, shard.bytes) == (20, (tmp_path / shard.name).stat().st_size)
    for name, column in clips.columns().items():
        assert list(table.columns()[name]) == list(column)
    content = (tmp_path / shard.name).read_bytes()[shard.offset :][: 20 * LAYOUT.frame_bytes]
    assert content == noise(20, 2, 3).numpy().tobytes()


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(3, 2)}, tmp_path / "old.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "old.safetensors").read_bytes()[:20])
    for name in ("old.safetensors", "half.safetensors"):
        with pytest.raises(DamagedFileError, match=name):
            read_shard(str(tmp_path), name, 100)
    with pytest.raises(ValueError, match="which LatentLayout"):
        write_shard(tmp_path / "x.safetensors", noise(20, 1, 3), few_clips(), LAYOUT)
    with pytest.raises(ValueError, match="19 frames do not hold the clips"):
        write_shard(tmp_path / "x.safetensors", noise(19, 2, 3), few_clips(), LAYOUT)


def test_clips_are_by_split_and_id_whatever_order_they_came_in(tmp_path: Path) -> None:
    clips = few_clips()
    backwards = clips.take(np.arange(5)[::-1])
    for name, table in {"forwards": clips, "backwards": backwards}.items():
        write_cache(tmp_path / name, noise(20, 2, 3), table, LAYOUT)
    one, other = (LatentCacheIndex.read(tmp_path / name) for name in ("forwards", "backwards"))
    assert [entry.id for entry in one.entries] == ["c", "d", "é", "a", "b"]
    assert list(one.entries) == list(other.entries)
    assert (one.clips_sha256, one.content_hash) == (other.clips_sha256, other.content_hash)
    assert [entry.other_captions for entry in one.entries[1:3]] == [(), ("other", "other")]


def test_tables_joined_are_one_after_the_other() -> None:
    clips = few_clips()
    joined = LatentClips.join([clips.take(np.array([3])), clips])
    assert list(joined.id) == ["a", *clips.id]
    assert list(joined.other_captions) == [("other",) * 3, *clips.other_captions]


@pytest.mark.parametrize("store", ["mean", "sample"])
def test_a_latent_kept_alone_is_taken_as_it_is(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path / "cache", noise(20, 1, 3), few_clips(), replace(LAYOUT, store=store))
    index = LatentCacheIndex.read(tmp_path / "cache")
    training = LatentDataset(index, "train", 4)
    for place, entry in enumerate(training.entries):
        rows = noise(20, 1, 3)[entry.first_frame : entry.first_frame + 4, 0]
        assert all(torch.equal(training[SampleKey(place, epoch)].latent.T, rows.float()) for epoch in (0, 7))


def test_one_latent_alone_takes_half_the_bytes() -> None:
    assert LAYOUT.frame_bytes == 2 * replace(LAYOUT, store="mean").frame_bytes == 12


def test_a_crop_reads_its_frames_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_cache(tmp_path / "cache", noise(20, 2, 3), few_clips(), LAYOUT)
    dataset = LatentDataset(LatentCacheIndex.read(tmp_path / "cache"), "train", 3, random=False)
    dataset[0]
    reads: list[tuple[int, int]] = []
    read = dataset._reader._reader.read

    def noted(name: str, offset: int, size: int) -> bytearray:
        reads.append((offset - shard.offset, size))
        return read(name, offset, size)

    monkeypatch.setattr(dataset._reader._reader, "read", noted)
    dataset[2]
    assert reads == [(dataset.entries[2].first_frame * 12, 3 * 12)]


def test_longer_latents_are_left_out_where_crops_are_not_wanted(tmp_path: Path) -> None:
    entries = [
        LatentEntry(id, id, "", "train", "s", first, frames, frames / 100)
        for id, first, frames in [("a", 0, 5), ("b", 5, 2), ("c", 7, 4)]
    ]
    write_cache(tmp_path / "cache", noise(11, 2, 3), LatentClips.of(entries, SPLITS, ["s"]), LAYOUT)
    index = LatentCacheIndex.read(tmp_path / "cache")
    whole = LatentDataset(index, "train", 4, repeats={"c": 2}, drops_longer=True)
    assert [entry.id for entry in whole.entries] == ["b", "c", "c"]
    assert [item.latent.shape[1] for item in whole] == whole.lengths(0).tolist() == [2, 4, 4]  # type: ignore[attr-defined]
    with pytest.raises(
        latents.LatentCacheError, match=r"'train' is longer than 1 frames, the shortest has 2; raise data"
    ):
        LatentDataset(index, "train", 1, drops_longer=True)


@pytest.mark.parametrize("place", ["folder", "url"])
def test_the_latents_of_a_batch_are_asked_for_together(tmp_path: Path, place: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "kept"))
    write_cache(tmp_path / "cache", noise(20, 2, 3), few_clips(), LAYOUT)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tmp_path / 'cache'}/", "/latents_in_batches", recursive=True)
    url = str(tmp_path / "cache") if place == "folder" else "memory://latents_in_batches"
    dataset = LatentDataset(LatentCacheIndex.read(url), "train", 3)
    asked: list[Any] = []
    ask = dataset._reader._reader.prefetch

    def noted(ranges: Any) -> None:
        asked.append(ranges)
        ask(ranges)

    monkeypatch.setattr(dataset._reader._reader, "prefetch", noted)
    loader = DataLoader(dataset, batch_size=3, sampler=[SampleKey(2, 1), SampleKey(0, 1), SampleKey(1, 1)])
    loader.collate_fn = list
    (batch,) = list(loader)
    assert [len(ranges) for ranges in asked] == [3]
    assert all(torch.equal(batch[at].latent, dataset[SampleKey(key, 1)].latent) for at, key in enumerate((2, 0, 1)))
    assert dataset._reader._reader._fetched == {}


def test_a_cache_at_a_url_gives_what_the_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "kept"))
    shard = write_cache(tmp_path / "cache", noise(20, 2, 3), few_clips(), LAYOUT)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tmp_path / 'cache'}/", "/latents_at_a_url", recursive=True)
    url = "memory://latents_at_a_url"
    here, there = (LatentDataset(LatentCacheIndex.read(place), "train", 3) for place in (tmp_path / "cache", url))
    assert all(torch.equal(here[place].latent, there[place].latent) for place in range(3))
    assert read_shard(url, shard.name, shard.bytes)[1] == shard
    filesystem.rm("/latents_at_a_url/clips.safetensors")
    assert LatentCacheIndex.read(url).splits == ["train", "val"]  # fetched once
    filesystem.pipe("/latents_at_a_url/index.json", b"{")
    with pytest.raises(latents.LatentCacheError, match=r"memory://latents_at_a_url/index\.json is damaged"):
        LatentCacheIndex.read(url)


def test_a_table_at_a_url_that_is_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "kept"))
    write_cache(tmp_path / "cache", noise(20, 2, 3), few_clips(), LAYOUT)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tmp_path / 'cache'}/", "/latents_of_another", recursive=True)
    filesystem.pipe("/latents_of_another/clips.safetensors", b"another table")
    with pytest.raises(latents.LatentCacheError, match=r"clips\.safetensors is not the file"):
        LatentCacheIndex.read("memory://latents_of_another")
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def kept_bytes(make: Callable[[], Any]) -> tuple[Any, int, int, int]:
    """What `make` gives; bytes that Python and NumPy keep of it and held at most, and new objects."""
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    made = make()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gc.collect()
    return made, kept, peak, len(gc.get_objects()) - before


@pytest.mark.slow
def test_opening_a_hundred_thousand_clips_makes_no_object_for_each(many: Path) -> None:
    LatentCacheIndex.read(many)  # what is imported and remembered at the first time
    index, kept, peak, objects = kept_bytes(lambda: LatentCacheIndex.read(many))
    assert (len(index.clips), objects < 200) == (MANY, True)
    assert kept < 200_000  # the columns are mapped
    assert peak < 60 * MANY


@pytest.mark.slow
def test_a_data_set_of_a_hundred_thousand_clips_keeps_their_row_numbers(many: Path) -> None:
    index = LatentCacheIndex.read(many)
    dataset, kept, _, objects = kept_bytes(lambda: LatentDataset(index, "train", 2, repeats={"clip-000000": 3}))
    assert len(dataset) == len(dataset.lengths(0)) == 9 * MANY // 10 + 2 * 9
    assert kept < 4 * len(dataset) + 100_000
    assert objects < 200
    assert [dataset.entries[place].id for place in (2, 3, 26, 27)] == [
        *("clip-0000000", "clip-0000001", "clip-0000008", "clip-0000010")
    ]


def test_a_data_set_travels_to_another_process_without_its_table(many: Path) -> None:
    dataset = LatentDataset(LatentCacheIndex.read(many), "val", 2)
    packed = pickle.dumps(dataset)
    assert len(packed) < 4 * len(dataset) + 10_000
    again = pickle.loads(packed)
    assert again.entries[5] == dataset.entries[5]
    assert torch.equal(again[5].latent, dataset[5].latent)


def private_dirty_bytes() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("Private_Dirty"))


class Growth(torch.utils.data.Dataset[int]):
    """Reads a thousand clips at each item, and says how many bytes this process has come to own by it."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        before = private_dirty_bytes()
        for place in range(1000):
            self.dataset[SampleKey((index * 30011 + place * 89) % len(self.dataset))]
        return private_dirty_bytes() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux alone tells")
def test_a_loader_process_copies_nothing_of_the_table(many: Path) -> None:
    dataset = LatentDataset(LatentCacheIndex.read(many), "train", 2)
    grown = [int(growth) for growth in DataLoader(Growth(dataset), num_workers=1)]
    assert grown[2] < 2_000_000  # as objects, 100,000 entries are 60 MB, dirtied as they are read


def test_shards_are_looked_at_by_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty shards of a large cache: none is opened before a clip of it is read."""
    monkeypatch.setattr(latents, "_HASHED_BYTES", 0)
    layout = replace(LAYOUT, channels=1, store="mean")
    clips = many_clips(40)
    clips = replace(clips, shard=np.arange(40, dtype=np.int32), first_frame=np.zeros(40, np.int64))
    shards = [
        write_shard(tmp_path / f"latents-00000-{number:05d}.safetensors", noise(2, 1, 1), many_clips(1), layout)
        for number in range(40)
    ]
    write_index(tmp_path, layout, clips, shards, (torch.zeros(1), torch.ones(1)))
    opened: list[str] = []
    monkeypatch.setattr(latents, "read_shard_header", _noting(opened, latents.read_shard_header))
    dataset = LatentDataset(LatentCacheIndex.read(tmp_path), "train", 2)
    assert opened == []
    dataset[0], dataset[0]
    assert opened == ["latents-00000-00000.safetensors"]


def _noting(names: list[str], read: Callable[..., Any]) -> Callable[..., Any]:
    def noted(reader: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return read(reader, name, *rest)

    return noted
