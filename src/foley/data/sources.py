"""Sources of clips: files listed in a manifest, and a cache."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from foley.data.audio_io import check_samples, read_audio
from foley.data.manifest import ManifestEntry
from foley.data.types import AudioItem, AudioSource, durations_seconds

_INT16_MAX = 32767


class ClipSource:
    """The clips of a manifest, mono at one rate; of longer files only the first `max_duration_seconds` are read."""

    def __init__(
        self,
        entries: Sequence[ManifestEntry],
        sample_rate_hz: int = 24000,
        max_duration_seconds: float | None = 30.0,
    ) -> None:
        self.entries = list(entries)
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds

    def __len__(self) -> int:
        return len(self.entries)

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """Of every clip, as `render` returns it; raises ValueError where the manifest does not say."""
        unknown = next((entry for entry in self.entries if entry.duration_seconds is None), None)
        if unknown is not None:
            raise ValueError(f"line {unknown.line} of the manifest, {unknown.id!r}, has no duration_seconds; add it")
        seconds = np.array([entry.duration_seconds for entry in self.entries], np.float32)
        return seconds if self.max_duration_seconds is None else seconds.clip(max=self.max_duration_seconds)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`, the same in every epoch; raises AudioError where the file cannot be used."""
        entry = self.entries[index]
        audio = read_audio(entry.path, self.sample_rate_hz, self.max_duration_seconds, entry.duration_seconds)
        return AudioItem(torch.from_numpy(audio), entry.caption, entry.label, entry.id)


class CachedSource:
    """Keeps the clips of a source that is the same in every epoch, as 16-bit integers scaled to each clip's peak.

    Every clip is rounded, kept or not, so that what is in the cache changes nothing but the time.

    Args:
        megabytes: of memory, in each process; clips that no longer fit are rendered at every access.
    """

    def __init__(self, source: AudioSource, megabytes: int) -> None:
        self.source = source
        self.sample_rate_hz = source.sample_rate_hz
        self._free_bytes = megabytes << 20
        self._kept: dict[int, tuple[AudioItem, float]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """The source's; raises ValueError where it has none."""
        return durations_seconds(self.source, epoch)

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
