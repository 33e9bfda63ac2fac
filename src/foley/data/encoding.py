"""Clips to a latent cache: every clip is encoded once, so that diffusion training never runs the codec.

Loader processes read and decode while the codec encodes. Shards are written as they fill (`foley.data.latent_folder`):
whatever stops an encoding, the same command goes on with the clips that no finished shard holds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from foley.core.channels import channels_of, lossy_mixes
from foley.core.devices import float32_products, to_device
from foley.core.hashing import hash_module
from foley.core.locks import FolderInUseError
from foley.core.logs import first_few, get_logger
from foley.core.numbers import COUNT, NumberRange
from foley.core.seeding import torch_generator
from foley.core.sharding import ALL, Shard
from foley.data.audio import AudioError
from foley.data.dataset import AudioDataset, AudioItem, clip_name
from foley.data.latent_folder import LatentFolder, LatentWriter, LeftOut, clip_key
from foley.data.latent_format import FORMAT, STORES, LatentCacheError, LatentEntry, LatentLayout
from foley.data.whole_clips import WINDOWS, LoadedClip, WholeClips

_log = get_logger(__name__)

_MAX_WAITING = 512  # clips kept back until others of their length fill a batch
_MAX_NAMED = 5  # clips of a kind that are named at the end

_NOT_HELD = "has a latent that float16 cannot hold"  # too large, or no number

_Notes = dict[tuple[str, str], tuple[int, list[str]]]
"""What clips of a split are, cut or silent, to their number and the first of their names."""

PRECISIONS = ("float32", "tf32", "bf16")


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
        """Of the latents of `audio` `[B, channels, T]`."""
        ...


@dataclass(frozen=True)
class EncodingOptions:
    """How clips become latents, and how the work is shared out.

    Args:
        batch_size: clips of one length encoded together.
        min_duration_seconds: shorter clips get silence at their end before they are encoded; silence is content.
        windows: of longer clips, "first" encodes the beginning alone, "all" as many latents as it takes, each of full
            length, with the caption of the whole: `<id>#<seconds>s` by where they begin.
        store: what is kept of a posterior: "mean_std", to be sampled anew in every epoch; "mean"; "sample", one of it.
        precision: of the codec: "float32"; on CUDA "tf32"; "bf16" by autocast.
        num_workers: loader processes that read and decode; 0 does it between batches.
        shard_megabytes, shard_minutes: a shard is written when it holds so much, or after so long.
        share: which of the clips this job encodes; jobs share nothing but the folder.
        overwrite: remove the latents that are there, and begin anew.

    Raises ValueError for what it cannot be.
    """

    batch_size: int = 16
    min_duration_seconds: float = 0.0
    windows: str = "first"
    store: str = "mean_std"
    precision: str = "float32"
    num_workers: int = 0
    shard_megabytes: float = 64.0
    shard_minutes: float = 5.0
    share: Shard = ALL
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, known in (("windows", WINDOWS), ("store", STORES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: give {' or '.join(known)}")
        COUNT.check("batch_size", self.batch_size)
        NumberRange(least=0, whole=True).check("num_workers", self.num_workers)
        for name in ("shard_megabytes", "shard_minutes"):
            NumberRange(above=0).check(name, getattr(self, name))
        if self.overwrite and self.share.count > 1:
            raise ValueError("overwrite=true with shards>1 would remove what other jobs write: remove the folder first")


def encode_latents(
    codec: LatentEncoder,
    datasets: Mapping[str, AudioDataset],
    output: str | Path,
    options: EncodingOptions = EncodingOptions(),
    device: str | torch.device = "cpu",
    processes: Fabric | None = None,
) -> bool:
    """Write a latent cache of the clips in `datasets` (by split) to `output`, or go on with one; is it complete?

    Clips that are in its shards already, by their names, are not encoded again, whichever job or number of processes
    has written them. A job that finds every clip encoded or left out completes the cache; so does one that has more
    clips than the cache, whose index then takes the place of the old one.

    Args:
        datasets: their `num_samples` is the longest clip that is encoded.
        output: a folder, or any fsspec URL.
        processes: launched ones that share out this job, this process being one of them; None: it does all.

    Raises:
        ValueError: the clips' sample rate is not the codec's.
        DataFaultError: too many clips cannot be used; fewer are left out and counted. What was encoded stays.
        LatentCacheError: `output` holds something else, or the latents of another request.
        FolderInUseError: another process encodes this share of `output`.
    """
    _check(codec, datasets)
    folder, keys = LatentFolder(str(output)), clip_keys(datasets)
    rank, world_size = (processes.global_rank, processes.world_size) if processes else (0, 1)
    if rank == 0:
        folder.claim(describe_request(codec, datasets, options), options.overwrite)
    _wait(processes)
    todo, total = _share(folder, keys, options)
    _wait(processes)  # until all of them have looked at the same shards
    if len(todo):
        encoder = _Encoder(codec, datasets, options, torch.device(device))
        share = options.share.split(rank, world_size)
        with folder.writer(share.number, encoder.layout, options.shard_megabytes, options.shard_minutes) as writer:
            encoder.encode(todo[rank::world_size], writer, _Bar(total, total - len(todo), world_size, rank > 0))
        _report(_gathered(encoder.notes, processes))
    _wait(processes)
    is_complete = rank == 0 and _complete(folder, datasets, keys)
    return bool(processes.broadcast(is_complete)) if processes else is_complete


def describe_request(
    codec: LatentEncoder, datasets: Mapping[str, AudioDataset], options: EncodingOptions
) -> dict[str, Any]:
    """All that latents depend on besides their clips: a folder holds the latents of one such request."""
    return {
        "format": FORMAT,
        "codec_hash": hash_module(_module(codec)),
        "sample_rate_hz": codec.sample_rate_hz,
        "hop_samples": codec.hop_samples,
        **{name: getattr(options, name) for name in ("min_duration_seconds", "windows", "store", "precision")},
        "splits": {split: _describe_clips(dataset) for split, dataset in sorted(datasets.items())},
    }


def _describe_clips(dataset: AudioDataset) -> dict[str, Any]:
    longest = None if dataset.num_samples is None else dataset.num_samples / dataset.source.sample_rate_hz
    about = {"max_duration_seconds": longest, "level": repr(dataset.level), "drop_silent": dataset.drop_silent}
    return {**about, "source": _describe_source(dataset.source)}


def _describe_source(source: Any) -> Any:
    """How clips are read, of the sources that a mixture or a cache holds."""
    if hasattr(source, "sources"):
        return [_describe_source(part) for part in source.sources]
    if hasattr(source, "source"):
        return _describe_source(source.source)
    about = {name: getattr(source, name) for name in ("max_duration_seconds", "downmix") if hasattr(source, name)}
    return about if (several := channels_of(source)) == 1 else {**about, "channels": several}


def clip_keys(datasets: Mapping[str, AudioDataset]) -> NDArray[np.int64]:
    """The keys `[N]` of all clips, split after split, in the journal of a latent cache."""
    return np.fromiter(
        (
            clip_key(split, clip_name(dataset.source, index))
            for split, dataset in datasets.items()
            for index in range(len(dataset))
        ),
        np.int64,
        sum(map(len, datasets.values())),
    )


def _share(folder: LatentFolder, keys: NDArray[np.int64], options: EncodingOptions) -> tuple[NDArray[np.int64], int]:
    """Places of the clips that this job is to encode, and how many it has in all.

    What was left out is tried again, until the cache is complete.
    """
    encoded = folder.encoded()
    if len(encoded) and not np.isin(encoded, keys).any():
        raise LatentCacheError(f"{folder.url} holds latents of other clips; give another output_dir, or overwrite=true")
    places = np.sort(np.unique(keys, return_index=True)[1])  # a mixture may hold a clip in several
    mine = options.share.of(places)
    settled = encoded
    if folder.is_merged:
        settled = np.union1d(encoded, [row.key for row in folder.left_out()])
    return mine[~np.isin(keys[mine], settled)], len(mine)


def _complete(folder: LatentFolder, datasets: Mapping[str, AudioDataset], keys: NDArray[np.int64]) -> bool:
    """Write the index, where every clip is encoded or left out and it does not say so yet."""
    encoded = folder.encoded()
    absent = set(np.setdiff1d(keys, encoded).tolist())
    left_out = [row for row in folder.left_out() if row.key in absent]
    if remaining := len(absent) - len(left_out):
        _log.info("%d clips are still to be encoded into %s: by other shards, or by theirs", remaining, folder.url)
        return False
    for split, dataset in datasets.items():
        reasons = [row.reason for row in left_out if row.split == split]
        dataset.refuse_too_many(len(reasons), reasons)
    if not folder.is_merged or not np.isin(encoded, keys).all():
        try:
            folder.merge(keys)
        except FolderInUseError:
            _log.info("the job of another shard completes %s", folder.url)
            return False
    _log.info(
        "latents of %d clips are in %s, %d were left out: train with data.cache_dir=%s",
        len(np.unique(keys)) - len(left_out),
        folder.url,
        len(left_out),
        folder.url,
    )
    return True


def _gathered(notes: _Notes, processes: Fabric | None) -> _Notes:
    """Of all processes, the first one's first."""
    world_size = processes.world_size if processes else 1
    return _joined(*(processes.broadcast(notes, source) if processes else notes for source in range(world_size)))


def _joined(*parts: _Notes) -> _Notes:
    joined: _Notes = {}
    for kind, (count, ids) in (note for part in parts for note in part.items()):
        before, named = joined.get(kind, (0, []))
        joined[kind] = before + count, [*named, *ids][: _MAX_NAMED + 1]
    return joined


def _report(notes: _Notes) -> None:
    for (split, what), (count, ids) in notes.items():
        _log.warning("%s: %d clips are %s: %s", split, count, what, first_few(ids, _MAX_NAMED))


def _wait(processes: Fabric | None) -> None:
    if processes is not None:
        processes.barrier()


def _check(codec: LatentEncoder, datasets: Mapping[str, AudioDataset]) -> None:
    _module(codec)
    if "train" not in datasets:
        raise LatentCacheError(f"the data has no split 'train', only {sorted(datasets)}: latents need its statistics")
    for split, dataset in datasets.items():
        if dataset.source.sample_rate_hz != codec.sample_rate_hz:
            raise ValueError(
                f"split {split!r} is at {dataset.source.sample_rate_hz} Hz and the codec at "
                f"{codec.sample_rate_hz} Hz; set the data's sample_rate_hz to the codec's"
            )
        if (given := channels_of(dataset.source)) != (wanted := channels_of(codec)):
            raise ValueError(
                f"split {split!r} has clips of {given} channels, the codec takes {wanted}: give data.channels={wanted}"
            )


def _module(codec: LatentEncoder) -> nn.Module:
    if not isinstance(codec, nn.Module):
        raise TypeError(f"the codec must be an nn.Module, got {type(codec).__name__}")
    return codec


class _Encoder:
    """Encodes the clips of a process."""

    def __init__(
        self,
        codec: LatentEncoder,
        datasets: Mapping[str, AudioDataset],
        options: EncodingOptions,
        device: torch.device,
    ) -> None:
        self._codec, self._datasets, self._options, self._device = codec, datasets, options, device
        _module(codec).to(device).eval()
        self._min_samples = round(options.min_duration_seconds * codec.sample_rate_hz)
        self.notes: _Notes = {}

    def layout(self, channels: int) -> LatentLayout:
        """Of this codec's latents."""
        codec, splits = self._codec, tuple(sorted(self._datasets))
        digest = hash_module(_module(codec))
        return LatentLayout(digest, codec.sample_rate_hz, codec.hop_samples, channels, self._options.store, splits)

    def encode(self, places: NDArray[np.int64], writer: LatentWriter, bar: "_Bar") -> None:
        """The clips at these places; while a GPU encodes a batch, the next is loaded and the one before is kept."""
        before: tuple[list[LoadedClip], Tensor] | None = None
        with bar, float32_products(self._options.precision == "tf32"):
            for batch in self._batches(self._usable(places, writer, bar)):
                latents = self._latents([window for clip in batch for window in clip.windows])
                if before:
                    self._keep(*before, writer, bar)
                before = batch, latents
            if before:
                self._keep(*before, writer, bar)
        lossy_mixes.report()

    def _usable(self, places: NDArray[np.int64], writer: LatentWriter, bar: "_Bar") -> Iterator[LoadedClip]:
        options = self._options
        clips = WholeClips(self._datasets, options.min_duration_seconds, options.windows)
        for clip in clips.load(places.tolist(), options.num_workers):
            if clip.notes:
                self.notes = _joined(self.notes, {(clip.split, what): (1, [clip.windows[0].id]) for what in clip.notes})
            if clip.fault is None:
                yield clip
            else:
                self._leave_out(clip, AudioError(*clip.fault), writer)
                bar.advance(1)

    def _leave_out(self, clip: LoadedClip, fault: AudioError, writer: LatentWriter) -> None:
        """Raises DataFaultError where there are too many."""
        writer.leave_out(LeftOut(clip.split, clip.name, str(fault)))
        self._datasets[clip.split].count_fault(clip.index, fault)

    def _batches(self, clips: Iterator[LoadedClip]) -> Iterator[list[LoadedClip]]:
        """Of clips with the same number of frames, so that no clip's latent depends on its neighbours' lengths."""
        waiting: dict[int, list[LoadedClip]] = {}
        for clip in clips:
            frames = self._frames(clip)
            waiting.setdefault(frames, []).append(clip)
            if _count(waiting[frames]) >= self._options.batch_size:
                yield waiting.pop(frames)
            elif sum(map(_count, waiting.values())) >= _MAX_WAITING:
                yield waiting.pop(max(waiting, key=lambda length: _count(waiting[length])))
        yield from waiting.values()

    def _frames(self, clip: LoadedClip) -> int:
        """Of each of its windows."""
        return math.ceil(max(clip.windows[0].num_samples, self._min_samples) / self._codec.hop_samples)

    @torch.no_grad()
    def _latents(self, windows: Sequence[AudioItem]) -> Tensor:
        """What is kept of them, float16 `[B, L, K, C]`, on the device, which may still be at it."""
        size = self._options.batch_size
        parts = [windows[first : first + size] for first in range(0, len(windows), size)]
        return torch.cat([self._kept(self._posterior(part), part) for part in parts])

    def _posterior(self, windows: Sequence[AudioItem]) -> Posterior:
        audio = self._audio(windows)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._options.precision == "bf16"):
            return self._codec.posterior(audio)

    def _audio(self, windows: Sequence[AudioItem]) -> Tensor:
        """Zero-padded to whole frames, on the device `[B, channels, T]`; nobody waits for the transfer."""
        hop = self._codec.hop_samples
        width = math.ceil(max(windows[0].num_samples, self._min_samples) / hop) * hop
        channels = torch.atleast_2d(windows[0].audio).shape[0]
        audio = torch.zeros(len(windows), channels, width, pin_memory=self._device.type == "cuda")
        for row, window in zip(audio, windows, strict=True):
            row[:, : window.num_samples] = window.audio
        return to_device(audio, self._device)

    def _kept(self, posterior: Posterior, windows: Sequence[AudioItem]) -> Tensor:
        """What `store` says, float16 `[B, L, K, C]`."""
        mean, std = posterior.mean.float(), posterior.std.float()
        if self._options.store == "sample":
            noise = [torch.randn(mean.shape[1:], generator=torch_generator("latent", window.id)) for window in windows]
            mean = mean + std * to_device(torch.stack(noise), self._device)
        parts = [mean, std] if self._options.store == "mean_std" else [mean]
        return torch.stack(parts, 1).permute(0, 3, 1, 2).to(torch.float16)

    def _keep(self, clips: Sequence[LoadedClip], latents: Tensor, writer: LatentWriter, bar: "_Bar") -> None:
        """Give the writer what can be kept; a clip of which float16 cannot hold all is left out."""
        rows = iter(latents.cpu())  # waits for the device
        for clip in clips:
            found = [(self._entry(clip, window), next(rows)) for window in clip.windows]
            if faulty := [entry.id for entry, latent in found if not bool(latent.isfinite().all())]:
                self._leave_out(clip, AudioError(faulty[0], _NOT_HELD), writer)
            else:
                writer.add(clip.name, found)
        bar.advance(len(clips))

    def _entry(self, clip: LoadedClip, window: AudioItem) -> LatentEntry:
        seconds = window.num_samples / self._codec.sample_rate_hz
        texts = window.id, window.caption, window.label, clip.split
        return LatentEntry(*texts, "", 0, 0, seconds, window.other_captions)


def _count(clips: Sequence[LoadedClip]) -> int:
    return sum(len(clip.windows) for clip in clips)


class _Bar:
    """How far a job is, with all its processes: they have equal shares, and this one counts for each of them."""

    def __init__(self, total: int, done: int, processes: int = 1, hidden: bool = False, **options: Any) -> None:
        columns = TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
        self.progress = Progress(*columns, TimeRemainingColumn(), disable=hidden, **options)
        self._done, self._processes = done, processes
        self.progress.add_task("", total=total, completed=done, rate="")

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def advance(self, clips: int) -> None:
        """With the rate over the whole time: one batch has no other speed."""
        (task,) = self.progress.tasks
        completed = min(task.completed + clips * self._processes, task.total or 0)
        rate = (completed - self._done) / max(task.elapsed or 0.0, 1e-3)
        self.progress.update(task.id, completed=completed, rate=f"{rate:.1f} clips/s")
