"""Whole clips for those who encode them: decoded by loader processes, and cut into the windows that are encoded."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from foley.core.channels import doubled_recordings, lossy_mixes
from foley.data.audio import AudioError
from foley.data.dataset import AudioDataset, AudioItem, AudioSource, SampleKey, clip_name, is_silent
from foley.data.resumable import leave_interrupts_to_training

WINDOWS = ("first", "all")
"""Of clips that are too long: the first alone, or as many as it takes."""


@dataclass(frozen=True)
class LoadedClip:
    """What a loader process makes of a clip: the windows that are encoded and what to say of it, or why it is no use.

    Args:
        index, name: its place in its split, and its name there (`foley.data.dataset.clip_name`).
        fault: path and reason of an AudioError.
    """

    split: str
    index: int
    name: str
    windows: tuple[AudioItem, ...] = ()
    notes: tuple[str, ...] = ()
    fault: tuple[str, str] | None = None


class WholeClips(Dataset[LoadedClip]):
    """All clips of `datasets`, split after split, whole and levelled: what is cut off them is decided, and noted, here.

    Args:
        datasets: their `num_samples` is the longest window.
        min_duration_seconds: shorter clips are noted.
        windows: see `WINDOWS`.
    """

    def __init__(self, datasets: Mapping[str, AudioDataset], min_duration_seconds: float, windows: str) -> None:
        self._longest = {split: dataset.num_samples for split, dataset in datasets.items()}
        self._datasets = {split: copy.copy(dataset) for split, dataset in datasets.items()}
        for dataset in self._datasets.values():
            dataset.num_samples = None
        self._ends = np.cumsum([len(dataset) for dataset in datasets.values()])
        self._shortest_seconds, self._all_windows = min_duration_seconds, windows == "all"

    def __getitem__(self, place: int) -> LoadedClip:
        number = int(np.searchsorted(self._ends, place, side="right"))
        split, dataset = list(self._datasets.items())[number]
        index = int(place - self._ends[number]) + len(dataset)
        clip = LoadedClip(split, index, clip_name(dataset.source, index))
        lossy, doubled = lossy_mixes.count, doubled_recordings.count
        try:
            item = dataset.load(SampleKey(index, 0))
            _check_texts(item)
        except AudioError as error:
            return replace(clip, fault=(error.path, error.reason))
        longest = self._longest[split] or item.num_samples
        parts = self._windows(item, longest, dataset.source.sample_rate_hz)
        notes = list(self._notes(item, longest, dataset.source))
        if get_worker_info() and lossy_mixes.count > lossy:  # which a loader process counts for itself alone
            notes.append("mixed from channels whose mean loses sound (data.splits.downmix=loudest keeps it)")
        if doubled_recordings.count > doubled:
            notes.append("mono, the same in all channels")
        return replace(clip, windows=_copied(parts), notes=tuple(notes))

    def load(self, places: Sequence[int], num_workers: int) -> Iterator[LoadedClip]:
        """The clips at `places`, in their order, read and decoded ahead by that many loader processes."""
        loader: Any = DataLoader(
            self,
            batch_size=None,
            sampler=places,
            num_workers=num_workers,
            worker_init_fn=leave_interrupts_to_training,
        )
        for clip in loader:
            # Each tensor of a loader process keeps a file open, and hundreds of clips may wait for their batch.
            yield replace(clip, windows=_copied(clip.windows))

    def _windows(self, item: AudioItem, longest: int, sample_rate_hz: int) -> Sequence[AudioItem]:
        """The last of several ends with the clip, and overlaps the one before."""
        last = item.num_samples - longest
        if last <= 0:
            return [item]
        if not self._all_windows:
            return [replace(item, audio=item.audio[..., :longest])]
        return [
            replace(item, audio=item.audio[..., start : start + longest], id=f"{item.id}#{start / sample_rate_hz:.2f}s")
            for start in [*range(0, last, longest), last]
        ]

    def _notes(self, item: AudioItem, longest: int, source: AudioSource) -> Iterator[str]:
        """What becomes of a clip besides its encoding."""
        rate, length = source.sample_rate_hz, item.num_samples
        limit = getattr(source, "max_duration_seconds", None)
        if is_silent(item.audio):
            yield "silent"
        if length < round(self._shortest_seconds * rate):
            yield f"shorter than {self._shortest_seconds:g} s and padded"
        if length > longest and not self._all_windows:
            yield f"cut to their first {longest / rate:g} s (windows=all)"
        elif length > longest and limit is not None and length >= round(limit * rate):
            yield f"read to their first {limit:g} s alone (data.splits.max_duration_seconds)"


def _copied(windows: Sequence[AudioItem]) -> tuple[AudioItem, ...]:
    """A view would take the whole clip with it from process to process."""
    return tuple(replace(window, audio=window.audio.clone()) for window in windows)


def _check_texts(item: AudioItem) -> None:
    """Raise AudioError for half a surrogate pair, which no shard could hold."""
    captions = [("caption", text) for text in (item.caption, *item.other_captions)]
    for name, text in (("id", item.id), ("label", item.label), *captions):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise AudioError(ascii(item.id), f"its {name} holds half a surrogate pair: {text!a}") from error
