"""Latent caches of earlier versions in today's format: `foley-latents-1` and `-2`, an index in JSON beside shards that
hold `mean` and `std` apart.

Ids, splits, lengths and statistics stay, and so does the hash that training notes of its data: a run on the old cache
goes on with the new one.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foley.core.files import read_tensors
from foley.core.hashing import hash_tensors
from foley.core.locks import only_writer
from foley.core.logs import get_logger
from foley.core.reading import DamagedFileError, read_json, reading
from foley.data.latent_format import (
    A_SHARD,
    AGAIN,
    INDEX_FILE,
    LatentCacheError,
    LatentClips,
    LatentEntry,
    LatentLayout,
    LatentShard,
    write_index,
    write_shard,
)

_log = get_logger(__name__)

_BOUND, _UNBOUND = "foley-latents-2", "foley-latents-1"  # no hash binds the shards of version 0.1
_TENSORS = ("mean", "std")


def convert_latents(source: Path, output_dir: Path) -> None:
    """Write the cache `source`, of an earlier format, to the folder `output_dir` in today's; shard by shard.

    Raises:
        LatentCacheError: `source` is no such cache, is damaged, or an entry of it is impossible; or `output_dir` holds
            something else than what a conversion left that did not end.
        FolderInUseError: another process is writing to `output_dir`.
    """
    layout, (mean, std), hashes, entries = _read_index(source)
    by_shard = defaultdict(list)
    for entry in entries:
        by_shard[entry.shard].append(entry)
    with only_writer(output_dir, f"the latents of {output_dir}"):
        _require_unfinished(output_dir)
        shards, tables = [], []
        for number, name in enumerate(sorted(by_shard)):
            shard, table = _convert_shard(source / name, by_shard[name], layout, hashes, output_dir, number)
            shards.append(shard)
            tables.append(replace(table, shard=np.full(len(table), number, np.int32)))
        write_index(output_dir, layout, LatentClips.join(tables), shards, (mean, std))
    _log.info("latents of %d clips are in %s: train with data.cache_dir=%s", len(entries), output_dir, output_dir)


def _require_unfinished(folder: Path) -> None:
    others = [path.name for path in folder.iterdir() if not path.name.startswith((".", "latents-"))]
    if others:
        raise LatentCacheError(f"{folder} holds {sorted(others)[0]} already; choose another output_dir")


def _read_index(folder: Path) -> tuple[LatentLayout, Tensor, Mapping[str, str] | None, list[LatentEntry]]:
    """Of `index.json`: the new layout, the statistics `[2, C]`, the shards' hashes, and the entries.

    Raises LatentCacheError, which names an impossible entry.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise LatentCacheError(f"{path} does not exist: {folder} is no latent cache; encode the latents first")
    what = "the index of a latent cache of an earlier format"
    try:
        with reading(path, what, AGAIN):
            stored = dict(read_json(path, what, AGAIN))
            if (found := stored["format"]) not in (_BOUND, _UNBOUND):
                raise ValueError(f"its format is {str(found)[:40]!r}, not {_BOUND} or {_UNBOUND}")
            if found == _BOUND and not isinstance(stored.get("shards"), dict):
                raise ValueError("`shards` must give the hash of each shard")
            entries = [LatentEntry(**entry) for entry in stored.pop("entries")]
            if not entries:
                raise ValueError("there are no clips")
            for entry in entries:
                _require_possible(entry)
            statistics = torch.tensor([stored["latent_mean"], stored["latent_std"]], dtype=torch.float64)
            layout = _layout(stored, statistics.shape[1], entries)
    except DamagedFileError as error:
        raise LatentCacheError(str(error)) from error
    if found == _UNBOUND:
        _log.warning("%s is of version 0.1: no hash binds its shards to the index", folder)
    return layout, statistics, stored["shards"] if found == _BOUND else None, entries


def _layout(stored: Mapping[str, Any], channels: int, entries: Sequence[LatentEntry]) -> LatentLayout:
    about = {name: stored[name] for name in ("codec_hash", "sample_rate_hz", "hop_samples")}
    splits = tuple(sorted({entry.split for entry in entries}))
    return LatentLayout(**about, channels=channels, store="mean_std", splits=splits)


def _require_possible(entry: LatentEntry) -> None:
    """Raise ValueError for an entry that no cache has; that clips lie apart is looked at when the new cache is read."""
    texts = (entry.id, entry.caption, entry.label, entry.split, entry.shard, *entry.other_captions)
    if isinstance(entry.other_captions, str) or any(not isinstance(text, str) for text in texts):
        raise ValueError(f"entry {entry.id!r}: its texts must be texts, and other_captions a list of them")
    if Path(entry.shard).name != entry.shard:
        raise ValueError(f"entry {entry.id!r}: shard {entry.shard!r} is no file of this folder")
    for name, smallest in (("first_frame", 0), ("num_frames", 1)):
        value = getattr(entry, name)
        if type(value) is not int or value < smallest:
            raise ValueError(f"entry {entry.id!r}: {name} is {value!r}, not a whole number of at least {smallest}")


def _convert_shard(
    path: Path,
    entries: Sequence[LatentEntry],
    layout: LatentLayout,
    hashes: Mapping[str, str] | None,
    folder: Path,
    number: int,
) -> tuple[LatentShard, LatentClips]:
    latent = _read_latent(path, layout.channels, hashes)
    if len(latent) < max(entry.first_frame + entry.num_frames for entry in entries):
        raise LatentCacheError(f"{path} has {len(latent)} frames, and {INDEX_FILE} names more; {AGAIN}")
    table = LatentClips.of(entries, layout.splits, [path.name])
    return write_shard(folder / f"latents-00000-{number:05d}.safetensors", latent, table, layout), table


def _read_latent(path: Path, channels: int, hashes: Mapping[str, str] | None) -> Tensor:
    """`[frames, 2, C]`, mean and std side by side."""
    try:
        tensors = read_tensors(path, A_SHARD, AGAIN)
        with reading(path, A_SHARD, AGAIN):
            mean, std = (tensors[name] for name in _TENSORS)
    except (DamagedFileError, FileNotFoundError) as error:
        raise LatentCacheError(str(error)) from error
    for name, tensor in zip(_TENSORS, (mean, std), strict=True):
        if not tensor.is_floating_point() or tensor.shape != (len(mean), channels):
            raise LatentCacheError(f"{path}: `{name}` is {tensor.dtype} {list(tensor.shape)}, not [frames, {channels}]")
    if hashes is not None and hash_tensors(tensors) != hashes.get(path.name):
        raise LatentCacheError(f"{path} is not the shard that {INDEX_FILE} describes; put it back, or {AGAIN}")
    return torch.stack((mean, std), 1).half()
