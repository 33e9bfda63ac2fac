"""Sources of clips: files listed in a manifest, a cache, and mixtures."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from foley.data.audio_io import check_samples, read_audio
from foley.data.manifest import ManifestEntry
from foley.data.types import AudioItem, AudioSource
from foley.seeding import numpy_generator

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
        rates = {source.sample_rate_hz for source in sources}
        if len(rates) != 1:
            raise ValueError(f"the sources of a mixture must share one sample rate, got {sorted(rates)}")
        self.sources = list(sources)
        self.sample_rate_hz = rates.pop()
        sizes = [len(source) for source in sources]
        self.shares = sizes if weights is None else _shares(weights, sum(sizes) if size is None else size, len(sizes))
        self._ends = list(accumulate(self.shares))
        self._orders = [numpy_generator("mixture", seed, i).permutation(n) for i, n in enumerate(sizes)]

    def __len__(self) -> int:
        return self._ends[-1]

    def render(self, index: int, epoch: int) -> AudioItem:
        """Slot `index` of `epoch`; raises what the source raises."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        slot = index - (self._ends[part] - self.shares[part])
        order = self._orders[part]
        return self.sources[part].render(int(order[(epoch * self.shares[part] + slot) % len(order)]), epoch)


def _shares(weights: Sequence[float], size: int, count: int) -> list[int]:
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"expected {count} weights, none negative, got {list(weights)}")
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * size).astype(int)
    return [int(share) for share in np.diff(ends, prepend=0)]
