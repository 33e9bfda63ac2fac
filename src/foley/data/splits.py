"""Sources of clips (files, a cache, a mixture), and train, validation and test splits of them, as configs name them."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from foley.core.channels import channels_of, check_downmix
from foley.core.logs import get_logger
from foley.core.seeding import derive_seed, numpy_generator
from foley.data.audio import check_samples, read_audio
from foley.data.dataset import AudioItem, AudioSource, clip_name, durations_seconds, known_faults
from foley.data.entries import SPLIT_NAMES, Entries, ManifestEntry, split_code
from foley.data.importers.annotations import read_audiocaps
from foley.data.manifest import OUR_COLUMNS, ManifestOptions, known_splits, of_split, read_manifest
from foley.data.preflight import preflight_of_ranks
from foley.data.preparation import AudioFolder
from foley.data.procedural import ProceduralDataset
from foley.data.shards import ShardIndex, ShardSource
from foley.data.tables import split_name
from foley.data.wordings import Wordings

_log = get_logger(__name__)

_INT16_MAX = 32767
_UNTIDY = re.compile(r"^[./]|/$|//|/\.|\\")  # what a path may have that has a shorter name


class ClipSource:
    """The clips of a manifest at one rate; of longer files only the first `max_duration_seconds` are read.

    `downmix` and `channels` are as `foley.data.audio.read_audio` takes them; raises ValueError for an unknown downmix.
    `known_faults` are of these clips, as `foley.data.dataset.CheckedSource` has them.

    A clip shorter than the first of `padded_seconds` gets silence at its end, up to one of them: always the same one,
    by its id. So single events are heard in clips of all lengths, and as many seconds of one length as of another.
    Raises ValueError where they do not rise.
    """

    def __init__(
        self,
        entries: Sequence[ManifestEntry],
        sample_rate_hz: int = 24000,
        max_duration_seconds: float | None = 30.0,
        downmix: str = "mean",
        known_faults: Sequence[str] = (),
        channels: int = 1,
        padded_seconds: Sequence[float] = (),
    ) -> None:
        self.downmix = check_downmix(downmix)
        if list(padded_seconds) != sorted(set(padded_seconds)) or min(padded_seconds, default=1.0) <= 0:
            raise ValueError(f"padded_seconds={list(padded_seconds)}: give lengths above 0, each longer than the last")
        self.padded_seconds = tuple(padded_seconds)
        weights = 1 / np.array(self.padded_seconds)
        self._padded_shares = weights.cumsum() / weights.sum()  # rising to 1
        self.audio_channels = channels
        self.known_faults = known_faults
        self.entries = Entries.of(entries)
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds

    def __len__(self) -> int:
        return len(self.entries)

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """Of every clip, as `render` returns it; raises ValueError where the manifest does not say."""
        seconds = self.entries.duration_seconds.astype(np.float32)
        if np.isnan(seconds).any():
            unknown = self.entries[int(np.isnan(seconds).argmax())]
            where = f"line {unknown.line} of the manifest, {unknown.id!r}," if unknown.line else repr(unknown.id)
            raise ValueError(f"{where} has no duration_seconds; add it, or set data.bucket_batches=null")
        seconds = seconds if self.max_duration_seconds is None else seconds.clip(max=self.max_duration_seconds)
        padded = (self._padded(index, float(own)) for index, own in enumerate(seconds))
        return np.fromiter(padded, np.float32, len(seconds)) if self.padded_seconds else seconds

    def _padded(self, index: int, seconds: float) -> float:
        """How long clip `index` is with its silence, of so many seconds without."""
        if not self.padded_seconds or seconds >= self.padded_seconds[0]:
            return seconds
        drawn = numpy_generator("padded", self.entries.id_of(index)).random()
        return self.padded_seconds[int(np.searchsorted(self._padded_shares, drawn, side="right"))]

    def clip_name(self, index: int) -> str:
        """Its id."""
        return self.entries.id_of(index)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`, the same in every epoch; raises AudioError where the file cannot be used."""
        entry = self.entries[index]
        limits = (self.max_duration_seconds, entry.duration_seconds)
        audio = torch.from_numpy(
            read_audio(entry.path, self.sample_rate_hz, *limits, self.downmix, self.audio_channels)
        )
        num_samples = round(self._padded(index, audio.shape[-1] / self.sample_rate_hz) * self.sample_rate_hz)
        audio = functional.pad(audio, (0, num_samples - audio.shape[-1]))
        return AudioItem(audio, entry.caption, entry.label, entry.id, entry.other_captions)


class CachedSource:
    """Keeps the clips of a source that is the same in every epoch, as 16-bit integers scaled to each clip's peak.

    Every clip is rounded, kept or not, so that what is in the cache changes nothing but the time.

    Args:
        megabytes: of memory, in each process; clips that no longer fit are rendered at every access.
    """

    def __init__(self, source: AudioSource, megabytes: int) -> None:
        self.source = source
        self.sample_rate_hz, self.audio_channels = source.sample_rate_hz, channels_of(source)
        self.known_faults = known_faults(source)
        self._free_bytes = megabytes << 20
        self._kept: dict[int, tuple[AudioItem, float]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """The source's; raises ValueError where it has none."""
        return durations_seconds(self.source, epoch)

    def clip_name(self, index: int) -> str:
        """The source's."""
        return clip_name(self.source, index)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`; raises what the source raises."""
        item, step = self._kept.get(index) or self._round(index)
        return replace(item, audio=item.audio.float() * step)

    def _round(self, index: int) -> tuple[AudioItem, float]:
        item = self.source.render(index, 0)
        check_samples(item.id, item.audio.numpy())
        step = float(item.audio.abs().amax()) / _INT16_MAX or 1.0
        rounded = replace(item, audio=(item.audio / step).round().to(torch.int16)), step
        if rounded[0].audio.nbytes <= self._free_bytes:
            self._free_bytes -= rounded[0].audio.nbytes
            self._kept[index] = rounded
        return rounded


class MixtureSource:
    """Several sources as one: each whole in every epoch, or each with a share of `size` samples.

    A source with a share walks through a fixed permutation of its clips from epoch to epoch, so that all of them are
    heard equally often, whether its share is smaller or larger than itself.

    Args:
        weights: relative shares; None takes every source whole.
        size: samples in an epoch with `weights` (default: the sum of the sources' sizes).
    """

    def __init__(
        self,
        sources: Sequence[AudioSource],
        weights: Sequence[float] | None = None,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        rates, numbers = {source.sample_rate_hz for source in sources}, {channels_of(source) for source in sources}
        if len(rates) != 1:
            raise ValueError(f"the sources of a mixture must share one sample rate, got {sorted(rates)}")
        if len(numbers) != 1:
            raise ValueError(f"the sources of a mixture must share one number of channels, got {sorted(numbers)}")
        self.sources = list(sources)
        self.sample_rate_hz, self.audio_channels = rates.pop(), numbers.pop()
        sizes = [len(source) for source in sources]
        self.shares = sizes if weights is None else _shares(weights, sum(sizes) if size is None else size, len(sizes))
        whole = (source for source, share, size in zip(sources, self.shares, sizes, strict=True) if share >= size)
        self.known_faults = [fault for source in whole for fault in known_faults(source)]
        self._ends = list(accumulate(self.shares))
        self._orders = [numpy_generator("mixture", seed, i).permutation(n) for i, n in enumerate(sizes)]

    def __len__(self) -> int:
        return self._ends[-1]

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """Of every slot of `epoch`; raises ValueError where a source does not know its own."""
        seconds = [
            durations_seconds(source, epoch)[self._clips(part, epoch, np.arange(self.shares[part]))]
            for part, source in enumerate(self.sources)
        ]
        return np.concatenate(seconds)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Slot `index` of `epoch`; raises what the source raises."""
        part, clip = self._find(index, epoch)
        return self.sources[part].render(clip, epoch)

    def clip_name(self, index: int) -> str:
        """The number of its source, and its name there: two sources may have clips of one id."""
        part, clip = self._find(index, 0)
        return f"{part}/{clip_name(self.sources[part], clip)}"

    def _find(self, index: int, epoch: int) -> tuple[int, int]:
        """The number of the source of a slot, and the clip there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        slot = index - (self._ends[part] - self.shares[part])
        return part, int(self._clips(part, epoch, np.array(slot)))

    def _clips(self, part: int, epoch: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into source `part` of the clips that its `slots` hold in `epoch`."""
        order = self._orders[part]
        clips: NDArray[np.int64] = order[(epoch * self.shares[part] + slots) % len(order)]
        return clips


def _shares(weights: Sequence[float], size: int, count: int) -> list[int]:
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"expected {count} weights, none negative, got {list(weights)}")
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * size).astype(int)
    return [int(share) for share in np.diff(ends, prepend=0)]


Splits = Mapping[str, AudioSource]
"""A source by the name of its split."""


def clip_splits(
    manifest: str,
    sample_rate_hz: int,
    audio_dir: str | None = None,
    max_duration_seconds: float | None = 30.0,
    cache_megabytes: int = 0,
    check_files: bool | str = True,
    optional: bool = False,
    downmix: str = "mean",
    val_fraction: float = 0.0,
    max_fault_fraction: float | None = None,
    channels: int = 1,
    wordings: str | None = None,
    padded_seconds: Sequence[float] = (),
    **options: Any,
) -> Splits:
    """Sources of a manifest, by its `split` column; rows without one are for training.

    Args:
        check_files: list files that cannot be used before training starts; "anew" looks at those, too, that were all
            right when an earlier run looked (`foley.data.preflight`).
        max_fault_fraction: of the clips; the look ends where more cannot be used, since training will.
        optional: an absent manifest gives no sources, and says so, instead of an error.
        downmix: of clips with another number of channels than `channels`: as for `foley.data.audio.read_audio`.
        val_fraction: of the clips, held out for validation where no row has a split (see `hold_out`).
        wordings: a table of further captions by label (see `foley.data.wordings`).
        padded_seconds: as for `ClipSource`.
        options: of `ManifestOptions`.
    """
    path = Path(manifest)
    if optional and not path.is_file():
        _log.warning("%s does not exist: going on without it", path)
        return {}
    root = path.parent if audio_dir is None else Path(audio_dir)
    entries = hold_out(read_manifest(path, root, ManifestOptions(**options)), val_fraction, root, str(path))
    entries = entries if wordings is None else Wordings.read(wordings).add_to(entries)
    reading = sample_rate_hz, max_duration_seconds, downmix
    return _sources(entries, reading, channels, cache_megabytes, check_files, max_fault_fraction, padded_seconds)


def folder_splits(
    folder: str,
    sample_rate_hz: int,
    max_duration_seconds: float | None = 30.0,
    cache_megabytes: int = 0,
    check_files: bool | str = True,
    downmix: str = "mean",
    val_fraction: float = 0.0,
    max_fault_fraction: float | None = None,
    channels: int = 1,
) -> Splits:
    """Sources of every audio file below `folder`, without captions: all that a codec needs.

    Folders at its top named as splits are (`train`, `valid`, ...) are those splits; otherwise `val_fraction` of the
    files is held out (see `hold_out`). Raises ValueError where there is no audio.
    """
    root = Path(folder)
    files = [ManifestEntry(root / name, "", name, split=_folder_split(name)) for name in AudioFolder(root).files]
    if not files:
        raise ValueError(f"{root} holds no audio, in it or below")
    entries = hold_out(files, val_fraction, root, str(root))
    reading = sample_rate_hz, max_duration_seconds, downmix
    return _sources(entries, reading, channels, cache_megabytes, check_files, max_fault_fraction)


def _folder_split(name: str) -> str:
    top, _, below = name.partition("/")
    try:
        return split_name(top) if below else ""
    except ValueError:
        return ""


def hold_out(entries: Sequence[ManifestEntry], fraction: float, root: Path, name: str) -> Entries:
    """The entries, with about `fraction` of them for validation and the others for training where none has a split.

    The path below `root` decides by its hash, so that captions of one recording stay together, and a clip keeps its
    split when others are added. There is at least one clip to validate on where the fraction is worth one, and always
    one to train on. Raises ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {fraction}")
    entries = Entries.of(entries)
    if entries.split_codes.any() or fraction == 0:
        return entries
    places = _places(entries, root)
    held = places < fraction
    if len(entries) * fraction >= 1:
        held |= places == places.min()
    if held.all():
        held[:] = False
    _log.warning(
        "%s names no splits: %d clips are for training, %d (val_fraction=%g, by a hash of the path) for validation",
        name,
        np.count_nonzero(~held),
        np.count_nonzero(held),
        fraction,
    )
    return entries.with_splits(np.where(held, split_code("val"), split_code("train")).astype(np.uint8))


def entries_of_split(
    manifest: Path | str,
    split: str | None,
    audio_dir: Path | str | None = None,
    options: ManifestOptions = OUR_COLUMNS,
    val_fraction: float = 0.0,
) -> Entries:
    """The entries of a split, the same ones that `clip_splits` gives a training; None takes all.

    Raises ManifestError, and ValueError where there is no such split.
    """
    root = Path(manifest).parent if audio_dir is None else Path(audio_dir)
    entries = read_manifest(manifest, root, options)
    if split is None:
        return entries
    return of_split(_for_training(hold_out(entries, val_fraction, root, str(manifest))), split, manifest)


def _for_training(entries: Entries) -> Entries:
    """The same, those without a split in the one for training."""
    codes = entries.split_codes
    return entries.with_splits(np.where(codes == split_code(""), split_code("train"), codes).astype(np.uint8))


def _places(entries: Entries, root: Path) -> NDArray[np.float64]:
    """Of each entry in [0, 1), by its path below `root` `[N]`."""

    def below(path: str) -> str:
        if entries.root == root and not _UNTIDY.search(path):
            return path  # as it comes out of what follows, which takes ten times as long
        return Path(os.path.relpath(entries.root / path, root)).as_posix()

    seeds = (derive_seed("held out", below(path)) for path in entries.paths)
    return np.fromiter(seeds, np.float64, len(entries)) / 2**63


def shard_splits(
    url: str,
    sample_rate_hz: int,
    max_duration_seconds: float | None = None,
    cache_megabytes: int = 0,
    check_files: bool = True,
    check_hashes: bool = False,
    channels: int = 1,
) -> Splits:
    """Sources of the shards that `scripts/make_shards.py` wrote to the folder `url`, a path or any fsspec URL.

    Args:
        check_files: compare the size of every shard with the index before training starts.
        check_hashes: read every shard, too, and compare its SHA-256.
    """
    index = ShardIndex.read(url)
    if check_files or check_hashes:
        index.check(check_hashes)
    return {
        name: _cached(ShardSource(index, split, sample_rate_hz, max_duration_seconds, channels), cache_megabytes)
        for name, split in known_splits(index.splits).items()
    }


def audiocaps_splits(
    captions_dir: str,
    audio_dir: str,
    sample_rate_hz: int,
    file_pattern: str = "{youtube_id}_{start_time}.wav",
    max_duration_seconds: float | None = 10.0,
    cache_megabytes: int = 0,
    check_files: bool | str = True,
    downmix: str = "mean",
    max_fault_fraction: float | None = None,
    channels: int = 1,
) -> Splits:
    """Sources of AudioCaps' train.csv, val.csv and test.csv in `captions_dir`, with audio in `audio_dir`."""
    clips = [
        entry
        for split in SPLIT_NAMES
        for entry in read_audiocaps(Path(captions_dir) / f"{split}.csv", audio_dir, file_pattern, split)
    ]
    entries = Entries.of(clips)
    reading = sample_rate_hz, max_duration_seconds, downmix
    return _sources(entries, reading, channels, cache_megabytes, check_files, max_fault_fraction)


def procedural_splits(
    sizes: Mapping[str, int],
    seed: int,
    duration_seconds: float,
    sample_rate_hz: int,
    classes: Sequence[str] | None = None,
    combination_probability: float = 0.0,
    fresh_each_epoch: bool = False,
    cache_megabytes: int = 0,
    channels: int = 1,
) -> Splits:
    """Synthesised clips, `sizes` of them by split; the splits share classes and no clip.

    Args:
        fresh_each_epoch: new training clips in every epoch, which no cache can keep.
    """

    def source(split: str, size: int) -> AudioSource:
        own_seed = derive_seed("procedural", seed, split)
        fresh = fresh_each_epoch and split == "train"
        drawn = classes, combination_probability, fresh, channels
        clips = ProceduralDataset(size, own_seed, duration_seconds, sample_rate_hz, *drawn)
        return clips if fresh else _cached(clips, cache_megabytes)

    return {split: source(split, size) for split, size in sizes.items()}


def joined_splits(
    parts: Mapping[str, Splits],
    train_weights: Mapping[str, float] | None = None,
    train_size: int | None = None,
    seed: int = 0,
) -> Splits:
    """Several sets of splits as one; a part without sources (an absent optional manifest) is left out.

    Args:
        train_weights: shares of the parts in training, by name (see `MixtureSource`); None takes them whole.
        train_size: training samples in an epoch with weights.

    Raises:
        ValueError: a part has no weight, or a split of an unknown name.
    """
    if train_weights is not None and set(train_weights) != set(parts):
        raise ValueError(f"train_weights are for {sorted(train_weights)}, but the parts are {sorted(parts)}")
    parts = {name: renamed_splits(part) for name, part in parts.items()}
    joined: dict[str, AudioSource] = {}
    for split in SPLIT_NAMES:
        sources = {name: part[split] for name, part in parts.items() if split in part}
        weights = [train_weights[name] for name in sources] if train_weights and split == "train" else None
        if sources:
            joined[split] = MixtureSource(list(sources.values()), weights, train_size if weights else None, seed)
    return joined


def renamed_splits(splits: Splits) -> Splits:
    """The sources under train, val and test, whatever they are called; raises ValueError as `known_splits` does."""
    return {name: splits[given] for name, given in known_splits(splits).items()}


def _cached(source: AudioSource, megabytes: int) -> AudioSource:
    return CachedSource(source, megabytes) if megabytes else source


def _sources(
    entries: Entries,
    reading: tuple[int, float | None, str],
    channels: int,
    cache_megabytes: int,
    check_files: bool | str,
    max_fault_fraction: float | None,
    padded_seconds: Sequence[float] = (),
) -> Splits:
    """Cached clips of each split; `reading` is the rate, the longest duration and the downmix of a `ClipSource`."""
    entries = _for_training(entries)
    faults: dict[str, list[str]] = {split: [] for split in entries.splits}
    for fault in preflight_of_ranks(entries, check_files, max_fault_fraction):
        faults[fault.entry.split].append(fault.reason)
    sources = {
        split: ClipSource(entries.of_split(split), *reading, known, channels, padded_seconds)
        for split, known in faults.items()
    }
    return {split: _cached(source, cache_megabytes) for split, source in sources.items()}
