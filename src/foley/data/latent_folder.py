"""Latent caches while they are written: by any number of processes, at any times, killed at any moment.

    request.json                      what was asked for: codec, lengths, what is kept; another request is refused
    latents-RRRRR-SSSSS.safetensors   of rank R, whole or absent: latents, their table, and which clips they are
    left_out-RRRRR-SSSSS.jsonl        clips that rank R could not use

The finished shards are the journal: what they hold is encoded, whoever wrote them, and nothing else says so. When every
clip is in a shard or left out, the tables become one, and the index is written last (see `foley.data.latent_format`).
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from foley.core.files import json_lines, write_json
from foley.core.locks import only_writer
from foley.core.ranges import RangeReader, TensorHeader, filesystem_of, publish
from foley.core.reading import parse_json, reading
from foley.core.seeding import derive_seed
from foley.data.latent_format import (
    A_SHARD,
    CLIPS_FILE,
    INDEX_FILE,
    LEFT_OUT_FILE,
    LatentCacheError,
    LatentClips,
    LatentEntry,
    LatentLayout,
    LatentShard,
    read_shard,
    write_index,
    write_shard,
)

REQUEST_FILE = "request.json"
_SHARD = re.compile(r"latents-(\d{5})-(\d{5,})\.safetensors")
_LEFT_OUT = re.compile(r"left_out-(\d{5})-(\d{5,})\.jsonl")
_OLD_SHARD = re.compile(r"latents-\d{5}\.safetensors")  # of formats 1 and 2
_WHOLE = (REQUEST_FILE, CLIPS_FILE, LEFT_OUT_FILE, INDEX_FILE)
_KEYS, _SUMS = "clip", "sums"  # tensors of a shard: the clip of each row [N], the sums of its training latents [2, C]
_READERS = 32  # threads that wait for a remote file system
_TRAINING = "train"

Result = TypeVar("Result")


def clip_key(split: str, name: str) -> int:
    """The number of a clip in the journal, by its split and its name there (`foley.data.dataset.clip_name`)."""
    return derive_seed("clip", split, name.encode(errors="replace").decode())  # as files hold it


@dataclass(frozen=True)
class LeftOut:
    """A clip that could not be encoded; `id` is its name in its split."""

    split: str
    id: str
    reason: str

    @property
    def key(self) -> int:
        """In the journal."""
        return clip_key(self.split, self.id)


class LatentFolder:
    """The folder of a latent cache, on a disk or at any fsspec URL, complete or not."""

    def __init__(self, url: str) -> None:
        self.url = url

    def claim(self, request: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin the cache that `request` asks for, or go on with it.

        Args:
            overwrite: remove what is there of a latent cache, and begin anew.

        Raises LatentCacheError where the folder holds anything else, the cache of another request among it, and
        FolderInUseError where another process writes what is to be removed.
        """
        files = self._files()
        ours = [name for name in files if _is_ours(name)]
        if files and not ours:
            raise LatentCacheError(f"{self.url} holds files that are not a latent cache; choose another output_dir")
        if overwrite:
            self._refuse_writers()
            self._remove(sorted(ours, key=lambda name: (name != INDEX_FILE, name == REQUEST_FILE)))
        elif REQUEST_FILE in files:
            return self._require_same(request)
        elif ours:
            raise LatentCacheError(
                f"{self.url} holds latents, but no {REQUEST_FILE} that says how they were encoded; choose another "
                "output_dir, or give overwrite=true to remove them"
            )
        publish(self.url, REQUEST_FILE, lambda path: write_json(path, dict(request)))

    @property
    def is_merged(self) -> bool:
        """Whether the index tells of all that was written; there may be more clips in the data by now.

        An index that was written when the data lacked some of them does not.
        """
        files = self._files()
        if INDEX_FILE not in files or any(_LEFT_OUT.fullmatch(name) for name in files):
            return False
        index = parse_json(self._text(INDEX_FILE), f"{self.url}/{INDEX_FILE}", "the index of a latent cache")
        names = self._names(_SHARD)
        if {shard["name"] for shard in index["shards"]} != set(names):
            return False
        keys = self._map(self._read_keys, names)
        return bool(index["num_clips"] == sum(map(len, _first_rows(keys, _joined(keys)))))

    def encoded(self) -> NDArray[np.int64]:
        """The keys of the clips in finished shards, each once, rising; raises DamagedFileError."""
        return np.unique(_joined(self._map(self._read_keys, self._names(_SHARD))))

    def left_out(self) -> list[LeftOut]:
        """The clips that could not be used, each once, as it was last tried; raises DamagedFileError."""
        found = self._map(self._read_left_out, [*self._names(re.compile(LEFT_OUT_FILE)), *self._names(_LEFT_OUT)])
        return list({row.key: row for rows in found for row in rows}.values())

    @contextmanager
    def writer(
        self, rank: int, layout: Callable[[int], LatentLayout], shard_megabytes: float = 64, shard_minutes: float = 5
    ) -> Iterator["LatentWriter"]:
        """The writer of this rank's shards; what it holds is written when the block ends, however it ends.

        Args:
            layout: of latents with so many channels.

        Raises FolderInUseError where another process writes as this rank; object stores know no such lock.
        """
        with self._only_writer(f".rank-{rank:05d}"):
            self._sweep(f"latents-{rank:05d}-", f"left_out-{rank:05d}-")
            writer = LatentWriter(self, rank, layout, round(shard_megabytes * 2**20), shard_minutes * 60)
            try:
                yield writer
            finally:
                writer.flush()

    def merge(self, wanted: NDArray[np.int64]) -> tuple[int, int]:
        """Write the table, what was left out and, last, the index of the clips of these keys; the counts of both.

        A clip that two ranks have encoded is taken once, from the first of its shards.

        Raises LatentCacheError where no clip of the split "train" was encoded, and FolderInUseError.
        """
        with self._only_writer(".merge"):
            self._sweep(CLIPS_FILE, LEFT_OUT_FILE, INDEX_FILE)
            sizes = self._files()
            finished = self._map(lambda name: self._read(name, sizes[name]), self._names(_SHARD))
            keys = [part.keys for part in finished]
            absent = set(np.setdiff1d(wanted, _joined(keys)).tolist())
            left_out = [row for row in self.left_out() if row.key in absent]
            rows = _first_rows(keys, wanted)
            kept = [_rows_of(self.url, *pair) for pair in zip(finished, rows, strict=True)]
            statistics = _statistics(kept)
            publish(self.url, LEFT_OUT_FILE, lambda path: _write_left_out(path, left_out))
            self._publish_index(kept, statistics, len(left_out))
            self._remove(self._names(_LEFT_OUT))
        return sum(len(part.keys) for part in kept), len(left_out)

    def next_number(self, rank: int) -> int:
        """Of the files that this rank writes."""
        found = [_SHARD.fullmatch(name) or _LEFT_OUT.fullmatch(name) for name in self._files()]
        return 1 + max((int(match[2]) for match in found if match and int(match[1]) == rank), default=-1)

    def publish_shard(self, rank: int, number: int, write: Callable[[Path], object]) -> None:
        """A shard, whole or not at all."""
        publish(self.url, f"latents-{rank:05d}-{number:05d}.safetensors", write)

    def publish_left_out(self, rank: int, number: int, rows: Sequence[LeftOut]) -> None:
        """What a rank could not use since its last shard."""
        publish(self.url, f"left_out-{rank:05d}-{number:05d}.jsonl", lambda path: _write_left_out(path, rows))

    def _publish_index(self, kept: Sequence["_Finished"], statistics: tuple[Tensor, Tensor], left_out: int) -> None:
        numbered = [
            replace(part.clips, shard=np.full(len(part.keys), number, np.int32)) for number, part in enumerate(kept)
        ]
        about = kept[0].layout, LatentClips.join(numbered), [part.shard for part in kept], statistics, left_out
        with nullcontext(self._root) if self._on_disk else TemporaryDirectory() as folder:
            write_index(Path(folder), *about)
            for name in () if self._on_disk else (CLIPS_FILE, INDEX_FILE):
                publish(self.url, name, Path(folder, name).replace)

    def _require_same(self, request: Mapping[str, Any]) -> None:
        begun = parse_json(self._text(REQUEST_FILE), f"{self.url}/{REQUEST_FILE}", "the request of a latent cache")
        ours = json.loads(json.dumps(dict(request)))
        if changed := sorted(key for key in begun | ours if begun.get(key) != ours.get(key)):
            was = "; ".join(f"{key} was {begun.get(key)}, is {ours.get(key)}" for key in changed)
            raise LatentCacheError(
                f"{self.url} holds latents of another request ({was}); give another output_dir, or overwrite=true to "
                "remove them and begin anew"
            )

    def _read_keys(self, name: str) -> NDArray[Any]:
        with self._reading(name):
            reader = RangeReader(self.url)
            return TensorHeader.read(reader, name).array(reader, _KEYS, name)

    def _read(self, name: str, size: int) -> "_Finished":
        with self._reading(name):
            layout, shard, clips = read_shard(self.url, name, size)
            reader = RangeReader(self.url)
            header = TensorHeader.read(reader, name)
            keys, sums = header.array(reader, _KEYS, name), header.array(reader, _SUMS, name)
        return _Finished(layout, shard, clips, keys, torch.from_numpy(sums.copy()))

    def _reading(self, name: str) -> Any:
        return reading(f"{self.url}/{name}", A_SHARD, "remove it; the same command encodes again what it held")

    def _read_left_out(self, name: str) -> list[LeftOut]:
        where, lines = f"{self.url}/{name}", self._text(name).split("\n")[:-1]
        with reading(where, "a list of clips left out", "remove it"):
            return [LeftOut(**parse_json(line, f"{where}, line {number}")) for number, line in enumerate(lines, 1)]

    def _text(self, name: str) -> str:
        return str(self._filesystem.cat_file(f"{self._root}/{name}").decode())

    def _names(self, pattern: re.Pattern[str]) -> list[str]:
        return sorted(name for name in self._files() if pattern.fullmatch(name))

    def _files(self) -> dict[str, int]:
        """Sizes in bytes by name; hidden files and folders are not counted."""
        try:
            self._filesystem.invalidate_cache()  # others write there too
            found = self._filesystem.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        files = {Path(about["name"]).name: about["size"] for about in found if about["type"] == "file"}
        return {name: size for name, size in files.items() if not name.startswith(".")}

    def _sweep(self, *beginnings: str) -> None:
        """Remove what a killed process has left of such files, which only one process writes."""
        for beginning in beginnings if self._on_disk else ():
            for path in Path(self._root).glob(f".{beginning}*"):
                path.unlink()

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._filesystem.rm_file(f"{self._root}/{name}")

    def _map(self, function: Callable[[str], Result], names: Sequence[str]) -> list[Result]:
        """Of every file; together where each is waited for."""
        if self._on_disk:
            return [function(name) for name in names]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(function, names))

    def _refuse_writers(self) -> None:
        for held in sorted(Path(self._root).glob(".rank-*")) if self._on_disk else ():
            with self._only_writer(held.name):
                pass  # a killed process left it

    @contextmanager
    def _only_writer(self, name: str) -> Iterator[None]:
        if not self._on_disk:
            yield
            return
        held = Path(self._root) / name
        with only_writer(held, f"the latents of {self.url}"):
            try:
                yield
            finally:
                shutil.rmtree(held, ignore_errors=True)  # over NFS the lock, which is open, keeps its folder

    @property
    def _filesystem(self) -> Any:
        return filesystem_of(self.url, os.getpid())[0]

    @property
    def _root(self) -> str:
        return filesystem_of(self.url, os.getpid())[1]

    @property
    def _on_disk(self) -> bool:
        return isinstance(self._filesystem, LocalFileSystem)


class LatentWriter:
    """Collects what a rank encodes, and writes a shard when it is full, or when minutes have passed since the last.

    A clip is in one shard, with all its windows.
    """

    def __init__(
        self, folder: LatentFolder, rank: int, layout: Callable[[int], LatentLayout], shard_bytes: int, seconds: float
    ) -> None:
        self._folder, self._rank, self._layout = folder, rank, layout
        self._shard_bytes, self._seconds = shard_bytes, seconds
        self._number = folder.next_number(rank)
        self._sums = torch.zeros(2, 1, dtype=torch.float64)
        self._empty()

    def add(self, name: str, windows: Sequence[tuple[LatentEntry, Tensor]]) -> None:
        """Append a clip by its name in its split: of each window what the table says, and its latent `[L, K, C]`."""
        for entry, latent in windows:
            self._keys.append(clip_key(entry.split, name))
            self._entries.append(replace(entry, first_frame=self._frames, num_frames=len(latent)))
            self._latents.append(latent)
            self._frames += len(latent)
            self._bytes += latent.nbytes
            if entry.split == _TRAINING:
                self._sums = self._sums + latent_sums(latent)
        self._flush_in_time()

    def leave_out(self, clip: LeftOut) -> None:
        """Note a clip that cannot be encoded."""
        self._left_out.append(clip)
        self._flush_in_time()

    def flush(self) -> None:
        """Write what was collected."""
        if self._entries:
            latent, sums = torch.cat(self._latents), self._sums
            layout = self._layout(latent.shape[-1])
            clips = LatentClips.of(self._entries, layout.splits, [""])
            more = {_KEYS: torch.tensor(self._keys), _SUMS: sums.expand(2, layout.channels).contiguous()}
            self._folder.publish_shard(
                self._rank, self._number, lambda path: write_shard(path, latent, clips, layout, more)
            )
        if self._left_out:
            self._folder.publish_left_out(self._rank, self._number, self._left_out)
        self._number += bool(self._entries or self._left_out)
        self._empty()

    def _flush_in_time(self) -> None:
        if self._bytes >= self._shard_bytes or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def _empty(self) -> None:
        self._entries: list[LatentEntry] = []
        self._keys: list[int] = []
        self._latents: list[Tensor] = []
        self._left_out: list[LeftOut] = []
        self._frames = self._bytes = 0
        self._sums = torch.zeros(2, 1, dtype=torch.float64)
        self._since = time.monotonic()


def latent_sums(latent: Tensor) -> Tensor:
    """Sums over the frames of `latent [L, K, C]` and of squares over frames and K: `[2, C]`, in double precision.

    Over all frames they give mean and variance of posterior samples, var(mean) + E[std^2], whoever added them up.
    """
    double = latent.double()
    return torch.stack([double[:, 0].sum(0), double.square().sum((0, 1))])


@dataclass(frozen=True, eq=False)
class _Finished:
    """A finished shard: what an index says of it, its table, the clip of each row `[N]`, and its sums `[2, C]`."""

    layout: LatentLayout
    shard: LatentShard
    clips: LatentClips
    keys: NDArray[np.int64]
    sums: Tensor


def _joined(keys: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *keys])


def _first_rows(keys: Sequence[NDArray[np.int64]], wanted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Of each shard, whose rows are of clips with these `keys`, the rows of wanted ones that no shard before it has."""
    joined, lengths = _joined(keys), list(map(len, keys))
    shards = np.repeat(np.arange(len(keys)), lengths)
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    kept = np.isin(joined, wanted) & (shards == shards[first][inverse])
    return [np.flatnonzero(rows) for rows in np.split(kept, np.cumsum(lengths)[:-1])] if len(keys) else []


def _rows_of(url: str, part: _Finished, rows: NDArray[np.int64]) -> _Finished:
    """Those rows of a shard; where some are left behind, its sums are added up again."""
    if len(rows) == len(part.keys):
        return part
    kept = replace(part, clips=part.clips.take(rows), keys=part.keys[rows])
    return replace(kept, sums=_add_up(url, kept))


def _add_up(url: str, part: _Finished) -> Tensor:
    layout, clips, reader = part.layout, part.clips, RangeReader(url)
    sums = torch.zeros(2, layout.channels, dtype=torch.float64)
    for row in np.flatnonzero(clips.split == layout.splits.index(_TRAINING)):
        first, frames = int(clips.first_frame[row]), int(clips.num_frames[row])
        place = part.shard.offset + first * layout.frame_bytes
        content = reader.read(part.shard.name, place, frames * layout.frame_bytes)
        sums += latent_sums(torch.frombuffer(content, dtype=torch.float16).view(frames, layout.parts, -1))
    return sums


def _statistics(finished: Sequence[_Finished]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the training latents."""
    training = [part.clips.split == part.layout.splits.index(_TRAINING) for part in finished]
    count = sum(int(part.clips.num_frames[rows].sum()) for part, rows in zip(finished, training, strict=True))
    if not count:
        raise LatentCacheError(f"no clip of the split {_TRAINING!r} was encoded: there are no latent statistics")
    mean, square = torch.stack([part.sums for part in finished]).sum(0) / count
    return mean, (square - mean.square()).clamp_min(0.0).sqrt()


def _write_left_out(path: Path, rows: Iterable[LeftOut]) -> None:
    with json_lines(path) as write:
        for row in rows:
            write(asdict(row))


def _is_ours(name: str) -> bool:
    return name in _WHOLE or any(pattern.fullmatch(name) for pattern in (_SHARD, _LEFT_OUT, _OLD_SHARD))
