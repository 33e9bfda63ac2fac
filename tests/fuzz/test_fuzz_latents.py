"""Damaged latent caches: every item is the one that was encoded, or one error names the folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import altered, bounded, damaged, right_or_named
from hypothesis import given
from hypothesis import strategies as st
from latent_parts import latent_cache_writer

from foley.core.columns import Column, write_columns
from foley.core.hashing import hash_file
from foley.data.latent_format import CLIPS_FILE, INDEX_FILE
from foley.data.latents import LatentCacheIndex, LatentDataset, LatentItem

CHANNELS = 2
FRAMES = [5, 9, 7, 12]  # of each clip


def read_all(folder: Path) -> list[LatentItem]:
    """Every item of every split."""
    index = LatentCacheIndex.read(folder)
    datasets = [LatentDataset(index, split, max(FRAMES), random=False) for split in index.splits]
    return [dataset[position] for dataset in datasets for position in range(len(dataset))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, LatentItem]]:
    """Four clips in two splits, and what reading them gives, by id."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    with latent_cache_writer(folder, "0" * 64, 2000, 100) as writer:
        for number, frames in enumerate(FRAMES):
            mean = torch.randn(CHANNELS, frames, generator=torch.Generator().manual_seed(number))
            split = "train" if number else "val"
            writer.add(mean, torch.full_like(mean, 0.1), f"clip {number}", f"sound {number}", "", split, frames / 20)
    return folder, {item.id: item for item in read_all(folder)}


def copied(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def assert_finite_and_whole(items: list[LatentItem] | None) -> None:
    for item in items or []:
        assert item.latent.shape[0] == CHANNELS
        assert 0 < item.latent.shape[1] <= max(FRAMES)
        assert bool(item.latent.isfinite().all())


@bounded
@given(st.data())
def test_damaged_shards_are_named_or_give_what_was_encoded(
    cache: tuple[Path, dict[str, LatentItem]], tmp_path: Path, data: st.DataObject
) -> None:
    folder, _ = cache
    copy = copied(folder, tmp_path)
    name = data.draw(st.sampled_from(sorted(file.name for file in folder.glob("*.safetensors"))))
    (copy / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    assert_finite_and_whole(right_or_named(lambda: read_all(copy), str(copy)))


@bounded
@given(st.data())
def test_an_altered_index_is_named_or_gives_whole_latents(
    cache: tuple[Path, dict[str, LatentItem]], tmp_path: Path, data: st.DataObject
) -> None:
    folder, _ = cache
    copy = copied(folder, tmp_path)
    stored = json.loads((folder / INDEX_FILE).read_text())
    (copy / INDEX_FILE).write_text(json.dumps(data.draw(altered(stored))))
    items = right_or_named(lambda: read_all(copy), str(copy))
    assert_finite_and_whole(items)
    assert items is None or len({item.id for item in items}) == len(items)


def rewrite_table(folder: Path, columns: Mapping[str, Column]) -> None:
    """Another table, and an index that names it."""
    path = folder / CLIPS_FILE
    write_columns(path, columns)
    stored = json.loads((folder / INDEX_FILE).read_text())
    stored.update(clips_sha256=hash_file(path), clips_bytes=path.stat().st_size)
    (folder / INDEX_FILE).write_text(json.dumps(stored))


@bounded
@given(st.data())
def test_an_altered_table_is_named_or_gives_whole_latents(
    cache: tuple[Path, dict[str, LatentItem]], tmp_path: Path, data: st.DataObject
) -> None:
    folder, _ = cache
    copy = copied(folder, tmp_path)
    columns = LatentCacheIndex.read(folder).clips.columns()
    name = data.draw(st.sampled_from(["split", "shard", "first_frame", "num_frames"]))
    numbers = np.array(columns[name])
    least, most = np.iinfo(numbers.dtype).min, np.iinfo(numbers.dtype).max
    values = st.one_of(st.integers(-2, 40), st.sampled_from([least, most])).filter(lambda value: least <= value <= most)
    numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(values)
    rewrite_table(copy, {**columns, name: numbers})
    assert_finite_and_whole(right_or_named(lambda: read_all(copy), str(copy)))


@bounded
@given(st.permutations(range(len(FRAMES))))
def test_clips_in_another_order_are_the_same_clips(
    cache: tuple[Path, dict[str, LatentItem]], tmp_path: Path, order: list[int]
) -> None:
    folder, clips = cache
    copy = copied(folder, tmp_path)
    rewrite_table(copy, LatentCacheIndex.read(folder).clips.take(np.array(order)).columns())
    items = read_all(copy)
    assert len(items) == len(clips)
    for item in items:
        assert item.caption == clips[item.id].caption
        assert torch.equal(item.latent, clips[item.id].latent)
