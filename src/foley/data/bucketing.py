"""Batches of clips of similar length, so that little of them is padding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foley.seeding import numpy_generator


@dataclass(frozen=True)
class LengthBuckets:
    """Rearranges a sampler's order (see `foley.data.sampler.Arrangement`); a function of (seed, epoch, order) alone.

    The order is cut into windows, the clips of a window are sorted by length, and its batches are mixed again. Batches
    of all ranks at one step hold neighbours, so that no rank waits for longer clips than its own.

    Args:
        lengths: lengths `[N]` of the clips in an epoch, in any unit.
        window_batches: more of them pad less and mix less.
    """

    lengths: Callable[[int], NDArray[np.generic]]
    window_batches: int
    seed: int = 0

    def __call__(self, order: NDArray[np.int64], epoch: int, unit: int) -> NDArray[np.int64]:
        """`order [N]` with batches of `unit` samples, over all ranks, of similar length; the remainder stays last."""
        lengths = self.lengths(epoch)
        generator = numpy_generator("buckets", self.seed, epoch)
        whole = len(order) // unit * unit
        windows = [
            self._window(order[start : min(start + self.window_batches * unit, whole)], lengths, unit, generator)
            for start in range(0, whole, self.window_batches * unit)
        ]
        return np.concatenate([*windows, order[whole:]])

    @staticmethod
    def _window(
        order: NDArray[np.int64], lengths: NDArray[np.generic], unit: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        sorted_order = order[np.argsort(lengths[order], kind="stable")]
        return generator.permutation(sorted_order.reshape(-1, unit)).reshape(-1)


def padding_fraction(lengths: NDArray[np.generic], order: NDArray[np.int64], batch_size: int) -> float:
    """The share of padding in whole batches that are as long as their longest clip."""
    batches = lengths[order[: len(order) // batch_size * batch_size]].reshape(-1, batch_size)
    return float(1 - batches.sum() / (batches.max(axis=1).sum() * batch_size))
