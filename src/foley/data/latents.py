"""A latent cache, safetensors shards and an index that names the codec that made them, and the data set it gives.

A shard holds `mean` and `std` of the posterior, float16 `[frames, C]`, clip after clip. Training samples the posterior,
crops and pads. A hash of each shard stands in the index and in the header of the shard itself, so that none is taken
for another; small caches are hashed again when they are opened.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from foley.core.columns import Texts
from foley.core.embeddings import EmbeddingStore, pad_rows
from foley.core.files import read_tensors
from foley.core.hashing import hash_tensors
from foley.core.logs import get_logger
from foley.core.reading import DamagedFileError, read_json, reading
from foley.core.seeding import numpy_generator, torch_generator
from foley.data.dataset import LatentBatch, SampleKey, crop_start, draw_caption, sample_key
from foley.data.manifest import ManifestOptions
from foley.data.tables import captions_in, refuse_lines, table_rows

_log = get_logger(__name__)

INDEX_FILE = "index.json"
FORMAT = "foley-latents-2"
_UNBOUND_FORMAT = "foley-latents-1"  # of version 0.1, whose shards no hash binds
SHARD_HASH = "sha256"
"""Of a shard's header: what the index says of it, so that to open a cache need not read it all."""

_AN_INDEX, _A_SHARD = "the index of a latent cache", "a shard of latents"
_AGAIN = "encode the latents again"
_HASHED_BYTES = 64 << 20  # caches up to this size are hashed whenever they are opened
_TENSORS = ("mean", "std")
_FLOATS = ("F16", "BF16", "F32")


class LatentCacheError(RuntimeError):
    """A latent cache that cannot be read or written; the message names the folder."""


class StaleCacheError(LatentCacheError):
    """A latent cache that another codec made."""


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
class LatentCacheIndex:
    """What is in a cache, and which codec made it. `latent_mean` and `latent_std` `[C]` are of the training split."""

    directory: Path
    codec_hash: str
    sample_rate_hz: int
    hop_samples: int
    latent_mean: list[float]
    latent_std: list[float]
    entries: list[LatentEntry]
    shards: Mapping[str, str] | None = None
    """The hash of each shard by its name; None in caches of version 0.1."""

    @property
    def splits(self) -> list[str]:
        return sorted({entry.split for entry in self.entries})

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each `[C]`."""
        return torch.tensor(self.latent_mean), torch.tensor(self.latent_std)

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError unless the codec with this hash made the cache."""
        if codec_hash != self.codec_hash:
            raise StaleCacheError(
                f"{self.directory} was encoded by the codec {self.codec_hash}, but the codec in use is {codec_hash}; "
                "encode the latents again with it, or use the codec that made them"
            )

    @classmethod
    def read(cls, directory: Path) -> "LatentCacheIndex":
        """The index in `directory`.

        Raises LatentCacheError where there is none, it is damaged, or an entry is impossible; the entry is named.
        """
        path = directory / INDEX_FILE
        if not path.is_file():
            raise LatentCacheError(f"{path} does not exist: {directory} is no latent cache; encode the latents first")
        try:
            with reading(path, _AN_INDEX, _AGAIN):
                stored: dict[str, Any] = dict(read_json(path, _AN_INDEX, _AGAIN))
                if (found := stored.pop("format", None)) not in (FORMAT, _UNBOUND_FORMAT):
                    raise LatentCacheError(f"{path} is not of the format {FORMAT}; {_AGAIN}")
                if found == FORMAT and not isinstance(stored.get("shards"), dict):
                    raise ValueError("`shards` must give the hash of each shard")
                entries = [LatentEntry(**entry) for entry in stored.pop("entries")]
                index = cls(directory, **stored, entries=entries)
                _check_index(index)
        except DamagedFileError as error:
            raise LatentCacheError(str(error)) from error
        if found == _UNBOUND_FORMAT:
            _log.warning("%s is of version 0.1: no hash binds its shards to the index; %s", directory, _AGAIN)
        return index

    def check_shards(self, names: Set[str]) -> None:
        """Raise LatentCacheError unless these shards are those that the index describes, and hold all of its entries.

        Headers alone are read, and the latents of a small cache, so that this takes moments for any cache.
        """
        ends = dict.fromkeys(sorted(names), 0)
        for entry in self.entries:
            if entry.shard in ends:
                ends[entry.shard] = max(ends[entry.shard], entry.first_frame + entry.num_frames)
        small = sum(_size(self.directory / name) for name in names) <= _HASHED_BYTES
        for name, end in ends.items():
            path = self.directory / name
            found = _check_shard(path, len(self.latent_mean), end)
            if self.shards is None:
                continue
            if small:
                found = hash_tensors(read_tensors(path, _A_SHARD, _AGAIN))
            if found != self.shards.get(name):
                raise LatentCacheError(f"{path} is not the shard that {INDEX_FILE} describes; put it back, or {_AGAIN}")


def _size(path: Path) -> int:
    if not path.is_file():
        raise LatentCacheError(f"{path} does not exist, but {INDEX_FILE} names it; put it back, or {_AGAIN}")
    return path.stat().st_size


def _check_shard(path: Path, channels: int, num_frames: int) -> str | None:
    """The hash that the shard's header names; raises LatentCacheError for shapes and types that no cache has."""
    try:
        with reading(path, _A_SHARD, _AGAIN), safe_open(path, framework="pt") as shard:
            kinds = {name: (shard.get_slice(name).get_dtype(), shard.get_slice(name).get_shape()) for name in _TENSORS}
            metadata: Mapping[str, str] = shard.metadata() or {}
    except DamagedFileError as error:
        raise LatentCacheError(str(error)) from error
    for name, (dtype, shape) in kinds.items():
        if dtype not in _FLOATS or len(shape) != 2 or shape[1] != channels:
            raise LatentCacheError(
                f"{path}: `{name}` is {dtype} {shape}, not float16 or float32 [frames, {channels}]; {_AGAIN}"
            )
        if shape[0] < num_frames:
            raise LatentCacheError(
                f"{path}: `{name}` has {shape[0]} frames, but {INDEX_FILE} names {num_frames}; {_AGAIN}"
            )
    return metadata.get(SHARD_HASH)


def _check_index(index: LatentCacheIndex) -> None:
    """Raise ValueError for numbers that no cache has; the entry is named."""
    if min(index.sample_rate_hz, index.hop_samples) < 1 or len(index.latent_mean) != len(index.latent_std):
        raise ValueError("sample_rate_hz, hop_samples and latent statistics must be positive, and fit each other")
    if not all(math.isfinite(value) for value in (*index.latent_mean, *index.latent_std)):
        raise ValueError("latent_mean and latent_std must be finite")
    last: LatentEntry | None = None
    for entry in sorted(index.entries, key=lambda entry: (entry.shard, entry.first_frame)):
        if fault := _fault(entry):
            raise ValueError(f"entry {entry.id!r}: {fault}")
        if last and last.shard == entry.shard and entry.first_frame < last.first_frame + last.num_frames:
            raise ValueError(f"entries {last.id!r} and {entry.id!r} share frames of {entry.shard}")
        last = entry


def _fault(entry: LatentEntry) -> str | None:
    if any(not isinstance(text, str) for text in (entry.id, entry.caption, entry.label, entry.split, entry.shard)):
        return "id, caption, label, split and shard must be texts"
    if isinstance(entry.other_captions, str) or any(not isinstance(text, str) for text in entry.other_captions):
        return "other_captions must be a list of texts"
    if Path(entry.shard).name != entry.shard:
        return f"shard {entry.shard!r} is no file of this folder"
    for name, smallest in (("first_frame", 0), ("num_frames", 1)):
        value = getattr(entry, name)
        if type(value) is not int or value < smallest:
            return f"{name} is {value!r}, not a whole number of at least {smallest}"
    return None


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

    Shards are memory-mapped, so that processes share one copy.

    Args:
        num_frames: longest item L; longer latents are cropped, shorter ones are kept (`LatentCollate` pads).
        random: crop anywhere and sample the posterior; otherwise crop at the start and take the posterior's mean.
        repeats: by the beginning of a clip's id, how often it occurs in an epoch; once where no beginning fits.
        text: holds the embeddings of all captions; None gives captions alone.

    Raises:
        LatentCacheError: the cache has no such split, a shard is not the one of the index, or, when read, a clip's
            latent is not finite.
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
    ) -> None:
        self.entries = _repeated([entry for entry in index.entries if entry.split == split], repeats or {})
        if not self.entries:
            raise LatentCacheError(f"{index.directory} has no split {split!r}, only {index.splits}")
        self.num_frames = num_frames
        self.seed = seed
        self.random = random
        self.text = text
        names = {entry.shard for entry in self.entries}
        index.check_shards(names)
        self._shards = {name: read_tensors(index.directory / name, _A_SHARD, _AGAIN) for name in names}

    def __len__(self) -> int:
        return len(self.entries)

    def lengths(self, epoch: int) -> NDArray[np.int64]:
        """Frames `[N]` of the items, the same in every epoch."""
        return np.array([min(entry.num_frames, self.num_frames) for entry in self.entries])

    def __getitem__(self, key: SampleKey | int) -> LatentItem:
        index, epoch = sample_key(key)
        entry = self.entries[index]
        generator = numpy_generator("latent_crop", self.seed, epoch, index) if self.random else None
        start = entry.first_frame + crop_start(entry.num_frames, self.num_frames, generator)
        rows = slice(start, start + min(entry.num_frames, self.num_frames))
        shard = self._shards[entry.shard]
        latent = shard["mean"][rows].float()
        if self.random:
            noise = torch.randn(latent.shape, generator=torch_generator("posterior", self.seed, epoch, index))
            latent = latent + shard["std"][rows].float() * noise
        if not bool(latent.isfinite().all()):
            raise LatentCacheError(f"{entry.shard}: the latent of clip {entry.id!r} is not finite; {_AGAIN}")
        caption = draw_caption(entry, self.seed, SampleKey(index, epoch)) if self.random else entry.caption
        context = None if self.text is None else self.text.get(caption)
        return LatentItem(latent.T, caption, entry.label, entry.id, context)


def _repeated(entries: list[LatentEntry], repeats: Mapping[str, int]) -> list[LatentEntry]:
    for beginning in repeats:
        if not any(entry.id.startswith(beginning) for entry in entries):
            _log.warning("data.repeats names %r, with which no clip's id begins: it has no effect", beginning)
    return [
        entry
        for entry in entries
        for _ in range(next((times for start, times in repeats.items() if entry.id.startswith(start)), 1))
    ]


def captions(index: LatentCacheIndex) -> Texts:
    """Every caption of every clip, as often as it occurs."""
    return Texts.of(caption for entry in index.entries for caption in (entry.caption, *entry.other_captions))


def read_captions(source: str, caption_column: str | Sequence[str] | None = None) -> Texts:
    """Every caption of a latent cache, of a manifest, or of a plain text with one a line, as often as it occurs.

    Args:
        caption_column: as `ManifestOptions` takes it.

    Raises LatentCacheError and TableError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return captions(LatentCacheIndex.read(path))
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
            caption=[item.caption for item in items],
            label=[item.label for item in items],
            id=[item.id for item in items],
        )
        if contexts := [item.context for item in items if item.context is not None]:
            batch["context"], batch["context_mask"] = pad_rows(contexts)
        return batch
