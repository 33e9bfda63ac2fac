"""Sources of clips: files listed in a manifest, and mixtures of sources."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from foley.data.audio_io import FloatArray, read_audio
from foley.data.manifest import ManifestEntry
from foley.data.types import AudioItem, AudioSource
from foley.seeding import numpy_generator

_INT16_MAX = 32767


class ClipSource:
    """The clips of a manifest, mono at one rate.

    Args:
        max_duration_seconds: only the beginning of longer files is read.
        cache_megabytes: memory, in each process, for decoded clips as 16-bit integers; 0 decodes at every access. With
            a cache every clip is rounded to 16 bits below its peak, kept or not, so that a full cache changes nothing.
    """

    def __init__(
        self,
        entries: Sequence[ManifestEntry],
        sample_rate_hz: int = 24000,
        max_duration_seconds: float | None = 30.0,
        cache_megabytes: int = 0,
    ) -> None:
        self.entries = list(entries)
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds
        self.cache_megabytes = cache_megabytes
        self._cache: dict[int, tuple[np.ndarray, float]] = {}
        self._free_bytes = cache_megabytes << 20

    def __len__(self) -> int:
        return len(self.entries)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`, the same in every epoch; raises AudioError where the file cannot be used."""
        entry = self.entries[index]
        return AudioItem(torch.from_numpy(self._samples(index)), entry.caption, entry.label, entry.id)

    def _samples(self, index: int) -> FloatArray:
        if not self.cache_megabytes:
            return self._decode(index)
        if index not in self._cache:
            rounded = _to_int16(self._decode(index))
            if rounded[0].nbytes > self._free_bytes:
                return _from_int16(*rounded)
            self._free_bytes -= rounded[0].nbytes
            self._cache[index] = rounded
        return _from_int16(*self._cache[index])

    def _decode(self, index: int) -> FloatArray:
        entry = self.entries[index]
        return read_audio(entry.path, self.sample_rate_hz, self.max_duration_seconds, entry.duration_seconds)


def _to_int16(samples: FloatArray) -> tuple[np.ndarray, float]:
    step = float(np.abs(samples).max()) / _INT16_MAX or 1.0
    return np.rint(samples / step).astype(np.int16), step


def _from_int16(rounded: np.ndarray, step: float) -> FloatArray:
    return rounded.astype(np.float32) * np.float32(step)


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
