"""The files of a latent cache (`foley-latents-3`): shards that describe themselves, a table of their clips, an index.

    latents-RRRRR-SSSSS.safetensors   the rank that wrote it and a running number: `latent` float16 [frames, K, C], clip
                                      after clip, and the table of its clips
    clips.safetensors                 the table of all clips, by split and id
    index.json                        written last: what the latents are, and where they start in each shard
    left_out.jsonl                    clips that could not be encoded

A clip's K C values of all its frames lie side by side, so that one range of one file is all that reading it takes. K is
2, the posterior's mean and standard deviation, or 1, a latent alone.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foley.core.columns import Column, Columns, TextLists, Texts, column_tensors, write_columns
from foley.core.files import write_json, write_tensors
from foley.core.hashing import hash_file
from foley.core.numbers import NumberRange
from foley.core.ranges import RangeReader, TensorHeader
from foley.core.reading import reading

FORMAT = "foley-latents-3"
INDEX_FILE = "index.json"
CLIPS_FILE = "clips.safetensors"
LEFT_OUT_FILE = "left_out.jsonl"
STORES = {"mean_std": 2, "mean": 1, "sample": 1}
"""What is kept of a posterior, and how many values that is: to be sampled anew in every epoch, its mean, one sample."""

A_SHARD, AGAIN = "a shard of latents", "encode the latents again"
_SIZE = NumberRange(least=1, most=2**31 - 1, whole=True)
_COUNT = NumberRange(least=0, most=2**62, whole=True)


class LatentCacheError(RuntimeError):
    """A latent cache that cannot be read or written; the message names the folder."""


@dataclass(frozen=True)
class LatentEntry:
    """One clip: `num_frames` rows of shard `shard` from row `first_frame`; `duration_seconds` without padding."""

    id: str
    caption: str
    label: str
    split: str
    shard: str
    first_frame: int
    num_frames: int
    duration_seconds: float
    other_captions: Sequence[str] = ()


@dataclass(frozen=True)
class LatentLayout:
    """What the latents of a cache are: of which codec, what of its posterior, and the names of the splits by code.

    Raises ValueError for what no cache has.

    >>> LatentLayout("1f", 24000, 480, 8, "mean_std", ("train", "val")).frame_bytes
    32
    """

    codec_hash: str
    sample_rate_hz: int
    hop_samples: int
    channels: int
    store: str
    splits: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "hop_samples", "channels"):
            _SIZE.check(name, getattr(self, name))
        if not isinstance(self.store, str) or self.store not in STORES:
            raise ValueError(f"store={self.store!r}: give {', '.join(STORES)}")
        if not self.splits or not all(isinstance(text, str) for text in (self.codec_hash, *self.splits)):
            raise ValueError("`codec_hash` and the names of `splits` must be texts")

    @property
    def parts(self) -> int:
        """K: latents kept side by side for every frame."""
        return STORES[self.store]

    @property
    def frame_bytes(self) -> int:
        """Of one frame in a shard."""
        return 2 * self.parts * self.channels

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "LatentLayout":
        """Of what `index.json` or the header of a shard says."""
        values = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
        if not isinstance(values["splits"], list):
            raise ValueError("`splits` must be a list of names")
        return cls(**{**values, "splits": tuple(values["splits"])})


@dataclass(frozen=True)
class LatentShard:
    """One shard as the index names it: `rows` frames from byte `offset` of a file of `bytes`; the latents' hash."""

    name: str
    rows: int
    offset: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.sha256, str) or Path(self.name).name != self.name:
            raise ValueError(f"shard {str(self.name)[:40]!r} is no file of this folder, or has no hash")
        for field in ("rows", "offset", "bytes"):
            _COUNT.check(f"{self.name}: {field}", getattr(self, field))


_NUMBERS = {
    "split": np.uint8,
    "shard": np.int32,
    "first_frame": np.int64,
    "num_frames": np.int32,
    "duration_seconds": np.float64,
}


@dataclass(frozen=True, eq=False)
class LatentClips:
    """The table of the clips of a cache, or of a shard: a column for each field of `LatentEntry`.

    Args:
        split: code `[N]` into the layout's splits.
        shard: number `[N]` in the index's list of shards; 0 in the table of a shard itself.
        mapped: the file that the columns are mapped from, by which the table is pickled.
    """

    id: Texts
    caption: Texts
    label: Texts
    other_captions: TextLists
    split: NDArray[np.uint8]
    shard: NDArray[np.int32]
    first_frame: NDArray[np.int64]
    num_frames: NDArray[np.int32]
    duration_seconds: NDArray[np.float64]
    mapped: Path | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mapped is not None:
            return LatentClips.read, (self.mapped,)
        fields: dict[str, Any] = dict(self.columns())
        return partial(LatentClips, **fields), ()

    @classmethod
    def of(cls, entries: Iterable[LatentEntry], splits: Sequence[str], shards: Sequence[str]) -> "LatentClips":
        """Of entries whose splits and shards are among these."""
        known = list(entries)
        codes = {name: code for code, name in enumerate(splits)}
        numbers = {name: number for number, name in enumerate(shards)}
        return cls(
            id=Texts.of(entry.id for entry in known),
            caption=Texts.of(entry.caption for entry in known),
            label=Texts.of(entry.label for entry in known),
            other_captions=TextLists.of([entry.other_captions for entry in known]),
            split=np.array([codes[entry.split] for entry in known], np.uint8),
            shard=np.array([numbers[entry.shard] for entry in known], np.int32),
            first_frame=np.array([entry.first_frame for entry in known], np.int64),
            num_frames=np.array([entry.num_frames for entry in known], np.int32),
            duration_seconds=np.array([entry.duration_seconds for entry in known], np.float64),
        )

    @classmethod
    def read(cls, path: Path) -> "LatentClips":
        """The table that `write_index` wrote, mapped; raises DamagedFileError."""
        return dataclasses.replace(cls.of_columns(Columns(path, "the table of a latent cache", AGAIN)), mapped=path)

    @classmethod
    def of_columns(cls, columns: Columns) -> "LatentClips":
        """The table in `columns`; raises DamagedFileError for columns of other kinds or lengths."""
        texts: dict[str, Any] = {name: columns.texts(name) for name in ("id", "caption", "label")}
        numbers: dict[str, Any] = {name: columns.numbers(name) for name in _NUMBERS}
        clips = cls(**texts, **numbers, other_captions=columns.lists("other_captions"))
        with reading(columns.path, "the table of a latent cache", AGAIN):
            for name, column in clips.columns().items():
                if isinstance(column, np.ndarray) and (column.dtype != _NUMBERS[name] or column.ndim != 1):
                    raise ValueError(f"`{name}` is {column.dtype} {list(column.shape)}")
                if len(column) != len(clips):
                    raise ValueError(f"`{name}` has {len(column)} rows, and `split` {len(clips)}")
        return clips

    @classmethod
    def join(cls, parts: Sequence["LatentClips"]) -> "LatentClips":
        """One after the other."""
        columns = [part.columns() for part in parts]
        joined: dict[str, Any] = {name: _join([part[name] for part in columns]) for name in columns[0]}
        return cls(**joined)

    def columns(self) -> dict[str, Column]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "mapped"}

    def take(self, rows: NDArray[np.integer[Any]]) -> "LatentClips":
        """The clips at `rows [K]`, in that order."""
        taken: dict[str, Any] = {name: _take(column, rows) for name, column in self.columns().items()}
        return LatentClips(**taken)

    def ordered(self) -> "LatentClips":
        """By split and id, whatever the order in which they were encoded."""
        ids = list(self.id)
        by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        return self.take(by_id[np.argsort(self.split[by_id], kind="stable")])


def _join(columns: Sequence[Any]) -> Any:
    kind = type(columns[0])
    return np.concatenate(columns) if kind is np.ndarray else kind.join(columns)


def _take(column: Column, rows: NDArray[np.integer[Any]]) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else column.take(rows)


def write_shard(
    path: Path, latent: Tensor, clips: LatentClips, layout: LatentLayout, more: Mapping[str, Tensor] | None = None
) -> LatentShard:
    """Write a shard, whole or not at all, and return what an index says of it.

    Args:
        latent: float16 `[frames, K, C]`, the clips' one after the other.
        clips: `first_frame` counts from the beginning of this shard.
        more: tensors that its writer keeps beside them, under names of their own.
    """
    if latent.dtype != torch.float16 or latent.shape[1:] != (layout.parts, layout.channels):
        raise ValueError(f"{path}: latents are {latent.dtype} {tuple(latent.shape)}, which {layout} does not describe")
    if len(clips) and int((clips.first_frame + clips.num_frames).max()) > len(latent):
        raise ValueError(f"{path}: {len(latent)} frames do not hold the clips of the table")
    metadata = {
        "format": FORMAT,
        "layout": json.dumps(dataclasses.asdict(layout)),
        "sha256": hash_latents(latent.contiguous().numpy()),
    }
    write_tensors(path, {"latent": latent, **column_tensors(clips.columns()), **(more or {})}, metadata)
    return read_shard_header(RangeReader(str(path.parent)), path.name, layout, path.stat().st_size)


def hash_latents(content: Any) -> str:
    """Of the bytes of latents, as hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_shard_header(reader: RangeReader, name: str, layout: LatentLayout, size: int) -> LatentShard:
    """What the header of a shard says of its latents; raises DamagedFileError where they are no such latents.

    Args:
        size: of the file, in bytes.
    """
    where = f"{reader.url}/{name}"
    with reading(where, A_SHARD, AGAIN):
        header = TensorHeader.read(reader, name)
        dtype, shape, offset = header.tensors["latent"]
        if header.metadata["format"] != FORMAT or dtype != "F16" or shape[1:] != [layout.parts, layout.channels]:
            raise ValueError(f"`latent` is {dtype} {shape}, not float16 [frames, {layout.parts}, {layout.channels}]")
        return LatentShard(name, shape[0], offset, size, header.metadata["sha256"])


def read_shard(url: str, name: str, size: int) -> tuple[LatentLayout, LatentShard, LatentClips]:
    """A finished shard described by itself, without its latents; from a disk or any fsspec URL.

    Args:
        size: of the file, in bytes.

    Raises DamagedFileError for what is no shard of this format.
    """
    columns = Columns.fetch(url, name, without=("latent",), mend=AGAIN)
    with reading(columns.path, A_SHARD, AGAIN):
        layout = LatentLayout.of(json.loads(columns.metadata["layout"]))
    return layout, read_shard_header(RangeReader(url), name, layout, size), LatentClips.of_columns(columns)


def write_index(
    folder: Path,
    layout: LatentLayout,
    clips: LatentClips,
    shards: Sequence[LatentShard],
    statistics: tuple[Tensor, Tensor],
    left_out: int = 0,
) -> None:
    """Write the table of all clips and, last, the index; the shards, in the table's numbers, are there already.

    Args:
        statistics: mean and standard deviation of the training split, each `[C]`.
        left_out: how many clips could not be encoded.
    """
    clips = clips.ordered()
    path = folder / CLIPS_FILE
    write_columns(path, clips.columns(), {"format": FORMAT})
    mean, std = statistics
    about = {
        "format": FORMAT,
        **dataclasses.asdict(layout),
        "latent_mean": mean.tolist(),
        "latent_std": std.tolist(),
        "num_clips": len(clips),
        "left_out": left_out,
        "content_sha256": content_hash(layout, clips),
        "clips_sha256": hash_file(path),
        "clips_bytes": os.stat(path).st_size,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX_FILE, about)


def content_hash(layout: LatentLayout, clips: LatentClips) -> str:
    """Of the codec and of the clips' ids, splits and lengths: of what a run was trained on, wherever it lies.

    Over the text that `json.dumps([codec_hash, [[id, split, num_frames], ...]])` makes, as runs of earlier formats
    noted it.
    """
    digest = hashlib.sha256(f"[{json.dumps(layout.codec_hash)}, [".encode())
    names = [json.dumps(name) for name in layout.splits]
    numbers = zip(clips.split.tolist(), clips.num_frames.tolist(), strict=True)
    for row, (id, (code, frames)) in enumerate(zip(clips.id, numbers, strict=True)):
        digest.update(f"{', ' if row else ''}[{json.dumps(id)}, {names[code]}, {frames}]".encode())
    digest.update(b"]]")
    return digest.hexdigest()
