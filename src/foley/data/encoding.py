"""Clips to a latent cache: every clip is encoded once, so that diffusion training never runs the codec.

Full shards are written as they fill, the index last; the folder appears under its name only when it is complete.
"""

import copy
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from foley.core.channels import lossy_mixes
from foley.core.hashing import hash_module
from foley.core.locks import LOCK_FILE, only_writer
from foley.core.logs import first_few, get_logger
from foley.data.audio import AudioError
from foley.data.dataset import AudioDataset, AudioItem, SampleKey, is_silent
from foley.data.latent_format import (
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

_FRAMES_PER_SHARD = 1 << 19
_MAX_WAITING = 512  # clips kept back until others of their length fill a batch


class LatentCacheWriter:
    """Collects encoded clips and writes full shards; `finish` writes the index. Use through `latent_cache_writer`."""

    def __init__(self, directory: Path, codec_hash: str, sample_rate_hz: int, hop_samples: int) -> None:
        self._directory = directory
        self._about = codec_hash, sample_rate_hz, hop_samples
        self._entries: list[LatentEntry] = []
        self._latents: list[Tensor] = []
        self._frames = self._latents_channels = 0
        self._shards: list[LatentShard] = []
        self._statistics = _RunningStatistics()

    def add(
        self,
        mean: Tensor,
        std: Tensor,
        id: str,
        caption: str,
        label: str,
        split: str,
        duration_seconds: float,
        other_captions: Sequence[str] = (),
    ) -> None:
        """Append one clip's posterior, each `[C, L]`; raises LatentCacheError where float16 cannot hold it."""
        halves = [tensor.T.to("cpu", torch.float16) for tensor in (mean, std)]
        if not all(bool(half.isfinite().all()) for half in halves):
            raise LatentCacheError(
                f"clip {id!r} has a posterior that float16 cannot hold: mean up to {mean.abs().max()}"
            )
        rows = (self._shard, self._frames, mean.shape[1])
        entry = LatentEntry(id, caption, label, split, *rows, duration_seconds, tuple(other_captions))
        self._entries.append(entry)
        self._latents.append(torch.stack(halves, 1))
        self._frames += mean.shape[1]
        if split == "train":
            self._statistics.add(*halves)
        if self._frames >= _FRAMES_PER_SHARD:
            self._write_shard()

    def finish(self) -> None:
        """Write what is left, and the index; raises LatentCacheError where nothing was encoded for training."""
        mean, std = self._statistics.result()
        if self._latents:
            self._write_shard()
        clips = LatentClips.of(self._entries, self._layout.splits, [shard.name for shard in self._shards])
        write_index(self._directory, self._layout, clips, self._shards, (mean, std))

    @property
    def num_clips(self) -> int:
        """That were added so far."""
        return len(self._entries)

    @property
    def _shard(self) -> str:
        return f"latents-00000-{len(self._shards):05d}.safetensors"

    @property
    def _layout(self) -> LatentLayout:
        splits = sorted({entry.split for entry in self._entries})
        return LatentLayout(*self._about, self._latents_channels, "mean_std", tuple(splits))

    def _write_shard(self) -> None:
        latent = torch.cat(self._latents)
        self._latents_channels = latent.shape[-1]
        entries = [entry for entry in self._entries if entry.shard == self._shard]
        layout = self._layout
        clips = LatentClips.of(entries, layout.splits, [self._shard])
        self._shards.append(write_shard(self._directory / self._shard, latent, clips, layout))
        self._latents, self._frames = [], 0


class _RunningStatistics:
    """Mean and standard deviation per channel of posterior samples: variance = var(mean) + E[std^2]."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, mean: Tensor, std: Tensor) -> None:
        mean, std = mean.double(), std.double()
        self._count += len(mean)
        self._sum = self._sum + mean.sum(0)
        self._square = self._square + (mean.square() + std.square()).sum(0)

    def result(self) -> tuple[Tensor, Tensor]:
        if not isinstance(self._sum, Tensor) or not isinstance(self._square, Tensor):
            raise LatentCacheError("no clip of the split 'train' was encoded: there are no latent statistics")
        mean = self._sum / self._count
        return mean, (self._square / self._count - mean.square()).clamp_min(0.0).sqrt()


@contextmanager
def latent_cache_writer(
    directory: Path, codec_hash: str, sample_rate_hz: int, hop_samples: int
) -> Iterator[LatentCacheWriter]:
    """A writer of the cache `directory`, which replaces an older cache there only after a clean exit.

    Raises:
        LatentCacheError: `directory` holds something that is not a latent cache.
        FolderInUseError: another process is writing this cache.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / INDEX_FILE).is_file():
        raise LatentCacheError(f"{directory} holds files that are not a latent cache; choose another output directory")
    partial = directory.with_name(f".{directory.name}.partial")
    with only_writer(partial, f"the latents of {directory}"):
        for file in partial.iterdir():  # of a process that was killed
            if file.name != LOCK_FILE:
                file.unlink()
        with ExitStack() as on_failure:
            on_failure.callback(shutil.rmtree, partial, ignore_errors=True)
            writer = LatentCacheWriter(partial, codec_hash, sample_rate_hz, hop_samples)
            yield writer
            writer.finish()
            _swap(partial, directory)
            on_failure.pop_all()


def _swap(new: Path, directory: Path) -> None:
    """Put `new` in the place of `directory`; a process killed in between leaves the old cache as `.name.old`."""
    old = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


class Posterior(Protocol):
    """A diagonal Gaussian over latents: mean and standard deviation, each `[B, C, L]`."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...


class LatentEncoder(Protocol):
    """The part of a codec that encoding needs; it is an `nn.Module` too, so that it can be hashed."""

    sample_rate_hz: int
    hop_samples: int

    def posterior(self, audio: Tensor) -> Posterior:
        """Of the latents of `audio` `[B, 1, T]`."""
        ...


WINDOWS = ("first", "all")


def encode_latents(
    codec: LatentEncoder,
    datasets: Mapping[str, AudioDataset],
    output_dir: Path,
    batch_size: int = 16,
    min_duration_seconds: float = 0.0,
    device: str | torch.device = "cpu",
    windows: str = "first",
) -> None:
    """Write a latent cache of all clips in `datasets` (by split) to `output_dir`, all of it or nothing.

    Args:
        datasets: their `num_samples` is the longest clip that is encoded.
        min_duration_seconds: shorter clips get silence at their end before they are encoded; silence is content.
        windows: of longer clips, "first" encodes the beginning alone, "all" as many clips as it takes, each of full
            length, with the caption of the whole: `<id>#<seconds>s` by where they begin.

    Raises:
        ValueError: the clips' sample rate is not the codec's, or `windows` is neither.
        DataFaultError: too many clips cannot be used; fewer are left out and counted.
        FolderInUseError: another process is writing to `output_dir`.
    """
    if not isinstance(codec, nn.Module):
        raise TypeError(f"the codec must be an nn.Module, got {type(codec).__name__}")
    if windows not in WINDOWS:
        raise ValueError(f"windows={windows}: give {' or '.join(WINDOWS)}")
    _check_rates(codec, datasets)
    codec.to(device).eval()
    min_samples = round(min_duration_seconds * codec.sample_rate_hz)
    output = latent_cache_writer(output_dir, hash_module(codec), codec.sample_rate_hz, codec.hop_samples)
    with output as writer, _progress() as progress:
        for split, dataset in datasets.items():
            task = progress.add_task(split, total=len(dataset) if windows == "first" else None, rate="")
            notes = _Notes(split, min_samples)
            items = (window for item in _usable_items(dataset) for window in notes.windows(item, dataset, windows))
            for batch in _equal_length_batches(items, codec.hop_samples, min_samples, batch_size):
                _encode_batch(codec, batch, split, min_samples, writer, device)
                _advance(progress, task, len(batch))
            notes.report()
    lossy_mixes.report()
    _log.info("latents of %d clips are in %s: train with data.cache_dir=%s", writer.num_clips, output_dir, output_dir)


def _check_rates(codec: LatentEncoder, datasets: Mapping[str, AudioDataset]) -> None:
    for split, dataset in datasets.items():
        if dataset.source.sample_rate_hz != codec.sample_rate_hz:
            raise ValueError(
                f"split {split!r} is at {dataset.source.sample_rate_hz} Hz and the codec at "
                f"{codec.sample_rate_hz} Hz; set the data's sample_rate_hz to the codec's"
            )


@dataclass
class _Notes:
    """What becomes of the clips of a split besides their encoding: ids of those cut, padded and silent."""

    split: str
    min_samples: int
    found: dict[str, list[str]] = field(default_factory=dict)

    def windows(self, item: AudioItem, dataset: AudioDataset, windows: str) -> Iterator[AudioItem]:
        """The parts of a clip that are encoded."""
        length, longest = len(item.audio), dataset.num_samples or len(item.audio)
        if is_silent(item.audio):
            self._note("silent", item)
        if length < self.min_samples:
            self._note(f"shorter than {self.min_samples / dataset.source.sample_rate_hz:g} s and padded", item)
        if length <= longest:
            yield item
        elif windows == "first":
            self._note(f"cut to their first {longest / dataset.source.sample_rate_hz:g} s (windows=all)", item)
            yield replace(item, audio=item.audio[:longest])
        else:
            limit = getattr(dataset.source, "max_duration_seconds", None)
            if limit is not None and length >= round(limit * dataset.source.sample_rate_hz):
                self._note(f"read to their first {limit:g} s alone (data.splits.max_duration_seconds)", item)
            yield from _all_windows(item, longest, dataset.source.sample_rate_hz)

    def _note(self, what: str, item: AudioItem) -> None:
        self.found.setdefault(what, []).append(item.id)

    def report(self) -> None:
        """Say how many clips of each kind there were, and name the first."""
        for what, ids in self.found.items():
            _log.warning("%s: %d clips are %s: %s", self.split, len(ids), what, first_few(ids))


def _all_windows(item: AudioItem, length: int, sample_rate_hz: int) -> Iterator[AudioItem]:
    """Parts of `length` samples that cover the clip; the last ends with it, and overlaps the one before."""
    last = len(item.audio) - length
    for start in [*range(0, last, length), last]:
        audio = item.audio[start : start + length]
        yield replace(item, audio=audio, id=f"{item.id}#{start / sample_rate_hz:.2f}s")


def _progress() -> Progress:
    columns = TextColumn("encode {task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn())


def _advance(progress: Progress, task_id: int, clips: int) -> None:
    """Over the whole time: a task of one batch has no other speed."""
    task = progress.tasks[task_id]
    rate = (task.completed + clips) / max(task.elapsed or 0.0, 1e-3)
    progress.update(task.id, advance=clips, rate=f"{rate:.1f} clips/s")


def _usable_items(dataset: AudioDataset) -> Iterator[AudioItem]:
    """Whole clips, levelled: what is cut off them is decided, and counted, by who encodes them."""
    whole = copy.copy(dataset)
    whole.num_samples = None
    for index in range(len(whole)):
        try:
            item = whole.load(SampleKey(index, 0))
            _check_texts(item)
            yield item
        except AudioError as error:
            whole.count_fault(index, error)


def _check_texts(item: AudioItem) -> None:
    """Raise AudioError for half a surrogate pair: the index, written when all is encoded, could not hold it."""
    captions = [("caption", text) for text in (item.caption, *item.other_captions)]
    for name, text in (("id", item.id), ("label", item.label), *captions):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise AudioError(ascii(item.id), f"its {name} holds half a surrogate pair: {text!a}") from error


def _equal_length_batches(
    items: Iterator[AudioItem], hop_samples: int, min_samples: int, batch_size: int
) -> Iterator[list[AudioItem]]:
    """Batches of clips with the same number of frames, so that no clip's latent depends on its neighbours' lengths."""
    waiting: dict[int, list[AudioItem]] = {}
    for item in items:
        frames = math.ceil(max(len(item.audio), min_samples) / hop_samples)
        waiting.setdefault(frames, []).append(item)
        if len(waiting[frames]) == batch_size:
            yield waiting.pop(frames)
        elif sum(map(len, waiting.values())) >= _MAX_WAITING:
            yield waiting.pop(max(waiting, key=lambda length: len(waiting[length])))
    yield from waiting.values()


@torch.no_grad()
def _encode_batch(
    codec: LatentEncoder,
    items: list[AudioItem],
    split: str,
    min_samples: int,
    writer: LatentCacheWriter,
    device: str | torch.device,
) -> None:
    hop = codec.hop_samples
    width = math.ceil(max(len(items[0].audio), min_samples) / hop) * hop
    audio = torch.stack([functional.pad(item.audio, (0, width - len(item.audio))) for item in items])[:, None]
    posterior = codec.posterior(audio.to(device))
    for item, mean, std in zip(items, posterior.mean, posterior.std, strict=True):
        seconds = len(item.audio) / codec.sample_rate_hz
        writer.add(mean, std, item.id, item.caption, item.label, split, seconds, item.other_captions)
