"""Several sources as one, whole or with weights."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from foley.data.types import AudioItem, AudioSource, durations_seconds
from foley.seeding import numpy_generator


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

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """Of every slot of `epoch`; raises ValueError where a source does not know its own."""
        seconds = [
            durations_seconds(source, epoch)[self._clips(part, epoch, np.arange(self.shares[part]))]
            for part, source in enumerate(self.sources)
        ]
        return np.concatenate(seconds)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Slot `index` of `epoch`; raises what the source raises."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        slot = index - (self._ends[part] - self.shares[part])
        return self.sources[part].render(int(self._clips(part, epoch, np.array(slot))), epoch)

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
