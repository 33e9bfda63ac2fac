"""A latent cache, whose files `foley.data.latent_format` describes, and the data set it gives.

What is read of it: the index, a table of clips that is mapped, and of each clip its own range of a shard. Nothing of it
becomes an object for each clip, so that millions of clips cost a process what thousands do.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from foley.core.columns import Texts
from foley.core.embeddings import EmbeddingStore, pad_rows
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.core.numbers import NumberRange
from foley.core.ranges import Range, RangeReader, filesystem_of, local_copy
from foley.core.reading import DamagedFileError, parse_json, reading
from foley.core.remote import is_file, url_of
from foley.core.seeding import numpy_generator, torch_generator
from foley.data.dataset import LatentBatch, SampleKey, crop_start, draw_caption, sample_key
from foley.data.latent_format import (
    AGAIN,
    CLIPS_FILE,
    FORMAT,
    INDEX_FILE,
    LatentCacheError,
    LatentClips,
    LatentEntry,
    LatentLayout,
    LatentShard,
    hash_latents,
    read_shard_header,
)
from foley.data.manifest import ManifestOptions
from foley.data.tables import captions_in, refuse_lines, table_rows

_log = get_logger(__name__)

OLD_FORMATS = ("foley-latents-1", "foley-latents-2")

_AN_INDEX = "the index of a latent cache"
_HASHED_BYTES = 64 << 20  # caches and tables up to this size are hashed whenever they are opened


class StaleCacheError(LatentCacheError):
    """A latent cache that another codec made."""


@dataclass(frozen=True)
class LatentCacheIndex:
    """What is in a cache, and which codec made it. `latent_mean` and `latent_std` `[C]` are of the training split.

    Args:
        url: the folder, a path or an fsspec URL.
        content_hash: of the codec and of ids, splits and lengths of the clips.
        left_out: how many clips could not be encoded.
        clips_sha256: of the table of clips, by which indices are compared.
    """

    url: str
    layout: LatentLayout
    latent_mean: Sequence[float]
    latent_std: Sequence[float]
    shards: Sequence[LatentShard]
    clips: LatentClips = field(compare=False)
    clips_sha256: str = ""
    content_hash: str = ""
    left_out: int = 0

    @property
    def codec_hash(self) -> str:
        return self.layout.codec_hash

    @property
    def sample_rate_hz(self) -> int:
        return self.layout.sample_rate_hz

    @property
    def hop_samples(self) -> int:
        return self.layout.hop_samples

    @property
    def splits(self) -> list[str]:
        """Those that have clips."""
        counts = np.bincount(self.clips.split, minlength=len(self.layout.splits))
        return sorted({name for name, count in zip(self.layout.splits, counts, strict=True) if count})

    @property
    def entries(self) -> "LatentEntries":
        """Of all clips."""
        return LatentEntries(self, np.arange(len(self.clips), dtype=np.int32))

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each `[C]`."""
        return torch.tensor(self.latent_mean), torch.tensor(self.latent_std)

    def rows(self, split: str) -> NDArray[np.int32]:
        """Where in the table the clips of a split are `[N]`; raises LatentCacheError where there are none."""
        code = self.layout.splits.index(split) if split in self.layout.splits else len(self.layout.splits)
        rows = np.arange(len(self.clips), dtype=np.int32)[self.clips.split == code]
        if not len(rows):
            raise LatentCacheError(f"{self.url} has no split {split!r}, only {self.splits}")
        return rows

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError unless the codec with this hash made the cache."""
        if codec_hash != self.codec_hash:
            raise StaleCacheError(
                f"{self.url} was encoded by the codec {self.codec_hash}, but the codec in use is {codec_hash}; "
                "encode the latents again with it, or use the codec that made them"
            )

    @classmethod
    def read(cls, url: str | Path) -> "LatentCacheIndex":
        """The index in the folder `url`; of a remote one the table of clips is fetched once and kept.

        Raises LatentCacheError where there is none, it is damaged, or an entry is impossible; the entry is named.
        """
        url = str(url) if "://" in str(url) else os.path.abspath(os.path.expanduser(url))
        where = f"{url}/{INDEX_FILE}"
        filesystem, root = filesystem_of(url, os.getpid())
        try:
            content: bytes = filesystem.cat_file(f"{root}/{INDEX_FILE}")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise LatentCacheError(
                f"{where} does not exist: {url} is no latent cache; encode the latents first"
            ) from error
        try:
            with reading(where, _AN_INDEX, AGAIN):
                return cls._of(url, dict(parse_json(content.decode("utf-8-sig"), where, _AN_INDEX, AGAIN)))
        except DamagedFileError as error:
            raise LatentCacheError(str(error)) from error

    @classmethod
    def _of(cls, url: str, stored: Mapping[str, Any]) -> "LatentCacheIndex":
        if (found := stored.get("format")) != FORMAT:
            mend = f"foley convert-latents cache_dir={url} output_dir=FOLDER makes one of it"
            mend = mend if found in OLD_FORMATS else AGAIN
            raise LatentCacheError(f"{url}/{INDEX_FILE} is not of the format {FORMAT}; {mend}")
        layout = LatentLayout.of(stored)
        shards = [LatentShard(**shard) for shard in stored["shards"]]
        statistics = stored["latent_mean"], stored["latent_std"]
        _check_statistics(layout, *statistics)
        NumberRange(least=0, whole=True).check("left_out", stored["left_out"])
        hashes = stored["clips_sha256"], stored["content_sha256"]
        if not all(isinstance(text, str) for text in hashes):
            raise ValueError("clips_sha256 and content_sha256 must be texts")
        clips = _read_clips(url, stored["clips_bytes"], hashes[0])
        if stored["num_clips"] != len(clips):
            raise ValueError(f"it names {stored['num_clips']} clips, and {CLIPS_FILE} holds {len(clips)}")
        check_clips(clips, layout, shards)
        return cls(url, layout, *statistics, shards, clips, *hashes, stored["left_out"])

    @property
    def is_small(self) -> bool:
        """Whether its shards are hashed whenever it is opened."""
        return sum(shard.bytes for shard in self.shards) <= _HASHED_BYTES

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        """Bytes of the files there, by one listing: to open thousands of shards over a network takes minutes."""
        filesystem, root = filesystem_of(self.url, os.getpid())
        return {Path(file["name"]).name: file["size"] for file in filesystem.ls(root, detail=True)}

    def check_shards(self, numbers: NDArray[np.int32]) -> None:
        """Raise LatentCacheError unless the shards of these numbers are there, in the size that the index names.

        Those of a small cache are read and compared by their hashes; others are when a `LatentReader` opens them.
        """
        reader = RangeReader(self.url) if self.is_small else None
        for number in numbers.tolist():
            shard = self.shards[number]
            where = f"{self.url}/{shard.name}"
            if (size := self._sizes.get(shard.name)) is None:
                raise LatentCacheError(f"{where} does not exist, but {INDEX_FILE} names it; put it back, or {AGAIN}")
            if size != shard.bytes:
                raise LatentCacheError(f"{where} has {size} bytes, but {INDEX_FILE} names {shard.bytes}; {AGAIN}")
            if reader is not None:
                self.check_shard(reader, shard)
                size = shard.rows * self.layout.frame_bytes
                if hash_latents(reader.read(shard.name, shard.offset, size)) != shard.sha256:
                    raise _another_shard(where)

    def check_shard(self, reader: RangeReader, shard: LatentShard) -> None:
        """Raise LatentCacheError unless the shard's header says what the index does."""
        try:
            found = read_shard_header(reader, shard.name, self.layout, shard.bytes)
        except DamagedFileError as error:
            raise LatentCacheError(str(error)) from error
        if found != shard:
            raise _another_shard(f"{self.url}/{shard.name}")


def _another_shard(where: str) -> LatentCacheError:
    return LatentCacheError(f"{where} is not the shard that {INDEX_FILE} describes; put it back, or {AGAIN}")


def _check_statistics(layout: LatentLayout, mean: Any, std: Any) -> None:
    """Raise ValueError, or what else `reading` names, unless each is finite `[C]`."""
    if len(mean) != layout.channels or len(std) != layout.channels:
        raise ValueError(f"latent_mean and latent_std must have {layout.channels} values each")
    if not all(value in NumberRange() for value in (*mean, *std)):
        raise ValueError("latent_mean and latent_std must be finite")


def _read_clips(url: str, size: int, sha256: str) -> LatentClips:
    """The table of clips; raises ValueError where it is not the one of the index."""
    try:
        path = local_copy(url, CLIPS_FILE, sha256)
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{CLIPS_FILE} is not there") from error
    if found != size or (found <= _HASHED_BYTES and hash_file(path) != sha256):
        raise ValueError(f"{CLIPS_FILE} is not the one that it describes")
    return LatentClips.read(path)


def check_clips(clips: LatentClips, layout: LatentLayout, shards: Sequence[LatentShard]) -> None:
    """Raise ValueError for numbers that no cache has; the clip is named."""
    if not len(clips):
        raise ValueError("there are no clips")
    rows = np.array([shard.rows for shard in shards], np.int64)
    _refuse(clips, clips.split >= len(layout.splits), "its split has no name")
    _refuse(clips, (clips.shard < 0) | (clips.shard >= len(shards)), "its shard is not among those of the index")
    _refuse(clips, clips.first_frame < 0, "its first frame is before its shard")
    _refuse(clips, clips.num_frames < 1, "it has no frames")
    _refuse(clips, clips.first_frame > rows[clips.shard] - clips.num_frames, "its frames are beyond its shard")
    _check_overlaps(clips, rows)


def _refuse(clips: LatentClips, faulty: NDArray[np.bool_], fault: str) -> None:
    if faulty.any():
        row = int(faulty.argmax())
        raise ValueError(f"clip {clips.id[row][:100]!r}: {fault} ({int(clips.first_frame[row])}, ...)")


def _check_overlaps(clips: LatentClips, rows: NDArray[np.int64]) -> None:
    """Raise ValueError where two clips share frames, and name them."""
    starts = (np.cumsum(rows) - rows)[clips.shard] + clips.first_frame
    ends = starts + clips.num_frames
    # Ranges are apart where the sorted ends fall between the sorted starts: no need to sort them in pairs.
    if (np.sort(starts)[1:] >= np.sort(ends)[:-1]).all():
        return
    order = np.argsort(starts, kind="stable")
    place = int((starts[order][1:] < ends[order][:-1]).argmax())
    first, second = (clips.id[int(row)][:100] for row in order[place : place + 2])
    raise ValueError(f"clips {first!r} and {second!r} share frames of a shard")


@dataclass(frozen=True, eq=False)
class LatentEntries(Sequence[LatentEntry]):
    """The clips at `rows [N]` of an index's table, each made when it is asked for."""

    cache: LatentCacheIndex
    rows: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> LatentEntry: ...
    @overload
    def __getitem__(self, index: slice) -> "LatentEntries": ...
    def __getitem__(self, index: int | slice) -> "LatentEntry | LatentEntries":
        if isinstance(index, slice):
            return LatentEntries(self.cache, self.rows[index])
        row, clips = int(self.rows[index]), self.cache.clips
        with reading(clips.mapped or self.cache.url, "the table of a latent cache", AGAIN):
            entry = LatentEntry(
                clips.id[row],
                clips.caption[row],
                clips.label[row],
                self.cache.layout.splits[clips.split[row]],
                self.cache.shards[clips.shard[row]].name,
                int(clips.first_frame[row]),
                int(clips.num_frames[row]),
                float(clips.duration_seconds[row]),
                clips.other_captions[row],
            )
            "".join((entry.id, entry.caption, entry.label, *entry.other_captions)).encode()  # or it was no UTF-8
        return entry


class LatentReader:
    """Reads latents of a cache by their range; the header of each shard is compared with the index before its first."""

    def __init__(self, index: LatentCacheIndex) -> None:
        self.index = index
        self._reader = RangeReader(index.url)
        self._known: set[int] = set()

    def read(self, row: int, start: int, num_frames: int) -> Tensor:
        """Frames of the clip at `row` of the table from its frame `start`: float16 `[frames, K, C]`."""
        layout, number = self.index.layout, int(self.index.clips.shard[row])
        if number not in self._known:
            self.index.check_shard(self._reader, self.index.shards[number])
            self._known.add(number)
        try:
            content = self._reader.read(*self._range(row, start, num_frames))
        except EOFError as error:
            raise LatentCacheError(f"{error}; {AGAIN}") from error
        return torch.frombuffer(content, dtype=torch.float16).view(num_frames, layout.parts, layout.channels)

    def prefetch(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Ask for what will be read next, each as `read` takes it."""
        self._reader.prefetch([self._range(*place) for place in places])

    def _range(self, row: int, start: int, num_frames: int) -> Range:
        index = self.index
        shard, frame_bytes = index.shards[index.clips.shard[row]], index.layout.frame_bytes
        first = int(index.clips.first_frame[row]) + start
        return shard.name, shard.offset + first * frame_bytes, num_frames * frame_bytes


@dataclass(frozen=True)
class LatentItem:
    """One clip's `latent [C, L]`, not normalised, at its true number of frames; its caption's `context [S, Dc]`."""

    latent: Tensor
    caption: str
    label: str
    id: str
    context: Tensor | None = None


class LatentDataset(Dataset[LatentItem]):
    """The latents of one split of a cache, keyed by `SampleKey`: item = f(seed, epoch, index).

    Args:
        num_frames: longest item L; longer latents are cropped, shorter ones are kept (`LatentCollate` pads).
        random: crop anywhere and sample the posterior, where it was kept; otherwise crop at the start and take its
            mean. A latent that was kept alone is taken as it is.
        repeats: by the beginning of a clip's id, how often it occurs in an epoch; once where no beginning fits.
        text: holds the embeddings of all captions; None gives captions alone.
        drops_longer: longer latents are left out instead of cropped.

    Raises:
        LatentCacheError: the cache has no such split, or none of its clips is short enough, a shard is not the one of
            the index, or, when read, a clip's latent is not finite.
    """

    def __init__(
        self,
        index: LatentCacheIndex,
        split: str,
        num_frames: int,
        seed: int = 0,
        random: bool = True,
        repeats: Mapping[str, int] | None = None,
        text: EmbeddingStore | None = None,
        drops_longer: bool = False,
    ) -> None:
        rows = _no_longer(index, split, num_frames) if drops_longer else index.rows(split)
        index.check_shards(np.unique(index.clips.shard[rows]))
        self.entries = LatentEntries(index, _repeated(index.clips, rows, repeats or {}))
        self.num_frames = num_frames
        self.seed = seed
        self.random = random
        self.text = text
        self._reader = LatentReader(index)

    def __len__(self) -> int:
        return len(self.entries)

    def lengths(self, epoch: int) -> NDArray[np.int64]:
        """Frames `[N]` of the items, the same in every epoch."""
        frames = self._reader.index.clips.num_frames[self.entries.rows]
        return np.minimum(frames, self.num_frames).astype(np.int64)

    def __getitem__(self, key: SampleKey | int) -> LatentItem:
        index, epoch = sample_key(key)
        entry = self.entries[index]
        kept = self._reader.read(*self._place(key))
        latent = kept[:, 0].float()
        if self.random and kept.shape[1] > 1:
            noise = torch.randn(latent.shape, generator=torch_generator("posterior", self.seed, epoch, index))
            latent = latent + kept[:, 1].float() * noise
        if not math.isfinite(float(latent.sum())):  # no sum of halves overflows; a look at each takes ten times as long
            raise LatentCacheError(f"{entry.shard}: the latent of clip {entry.id!r} is not finite; {AGAIN}")
        caption = self._caption(key)
        context = None if self.text is None else self.text.get(caption)
        return LatentItem(latent.T, caption, entry.label, entry.id, context)

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[LatentItem]:
        """The items of a batch, asked for together: the disk has them all to work on."""
        self._reader.prefetch([self._place(key) for key in keys])
        if self.text is not None:
            self.text.prefetch([self._caption(key) for key in keys])
        return [self[key] for key in keys]

    def _caption(self, key: SampleKey | int) -> str:
        entry = self.entries[sample_key(key).index]
        return draw_caption(entry, self.seed, sample_key(key)) if self.random else entry.caption

    def _place(self, key: SampleKey | int) -> tuple[int, int, int]:
        """What of the cache an item is: its clip's row, and the first and the number of the frames kept of it."""
        index, epoch = sample_key(key)
        row = int(self.entries.rows[index])
        length = int(self._reader.index.clips.num_frames[row])
        generator = numpy_generator("latent_crop", self.seed, epoch, index) if self.random else None
        return row, crop_start(length, self.num_frames, generator), min(length, self.num_frames)


def _no_longer(index: LatentCacheIndex, split: str, num_frames: int) -> NDArray[np.int32]:
    """Where in the table the clips of a split are that have at most `num_frames`; LatentCacheError where none has."""
    rows = index.rows(split)
    frames = index.clips.num_frames[rows]
    if (kept := rows[frames <= num_frames]).size:
        return kept
    raise LatentCacheError(
        f"{index.url}: every clip of its split {split!r} is longer than {num_frames} frames, the shortest has "
        f"{frames.min()}; raise data.duration_seconds, or crop them with data.drops_longer=false"
    )


def _repeated(clips: LatentClips, rows: NDArray[np.int32], repeats: Mapping[str, int]) -> NDArray[np.int32]:
    """`rows`, each as often as the first beginning that fits its id says."""
    if not repeats:
        return rows
    times, free = np.ones(len(rows), np.int64), np.ones(len(rows), bool)
    for beginning, count in repeats.items():
        fits = clips.id.start_with(beginning)[rows]
        if not fits.any():
            _log.warning("data.repeats names %r, with which no clip's id begins: it has no effect", beginning)
        times[fits & free], free[fits] = count, False
    return np.repeat(rows, times)


def captions(index: LatentCacheIndex) -> Texts:
    """Every caption of every clip, as often as it occurs."""
    return Texts.join([index.clips.caption, index.clips.other_captions.texts])


def read_captions(source: str, caption_column: str | Sequence[str] | None = None) -> Texts:
    """Every caption of a latent cache, of a manifest, or of a plain text with one a line, as often as it occurs.

    Args:
        caption_column: as `ManifestOptions` takes it.

    Raises LatentCacheError and TableError.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (url_of(source) is not None and not is_file(Path(source))):
        return captions(LatentCacheIndex.read(source))
    columns, found, problems = ManifestOptions(caption_column=caption_column).caption_columns, [], []
    for line, row in table_rows(path, [columns], text_column=columns[0]):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            found += captions_in(row, columns)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        refuse_lines(path, problems)
    return Texts.of(found)


class LatentCollate:
    """Items to a `LatentBatch` of `num_frames`, zero-padded at the end and masked; None pads to the longest."""

    def __init__(self, num_frames: int | None) -> None:
        self.num_frames = num_frames

    def __call__(self, items: Sequence[LatentItem]) -> LatentBatch:
        lengths = torch.tensor([item.latent.shape[1] for item in items])
        width = self.num_frames or int(lengths.max())
        padded = [functional.pad(item.latent, (0, width - item.latent.shape[1])) for item in items]
        batch = LatentBatch(
            latent=torch.stack(padded),
            frame_mask=torch.arange(width) < lengths[:, None],
            is_padded=bool((lengths < width).any()),
            caption=[item.caption for item in items],
            label=[item.label for item in items],
            id=[item.id for item in items],
        )
        if contexts := [item.context for item in items if item.context is not None]:
            batch["context"], batch["context_mask"] = pad_rows(contexts)
        return batch
