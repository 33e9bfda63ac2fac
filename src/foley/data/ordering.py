"""Which clip comes when: a permutation by (seed, epoch), shared out over ranks, continued exactly after a restart.

`LengthBuckets` rearranges it so that a batch holds clips of similar length, and little of it is padding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from foley.core.logs import get_logger
from foley.core.seeding import numpy_generator
from foley.data.dataset import SampleKey

_log = get_logger(__name__)


Arrangement = Callable[[np.ndarray, int, int], np.ndarray]
"""`(order [N], epoch, samples in a step of all ranks) -> order [N]`."""


class Position(NamedTuple):
    """A place in the order: `consumed` samples, over all ranks, of `epoch`."""

    epoch: int = 0
    consumed: int = 0


class SamplerState(TypedDict):
    """A `Position` in a data set of `size` samples."""

    epoch: int
    consumed: int
    size: int


class ResumableSampler(Sampler[SampleKey]):
    """Yields this rank's `SampleKey`s: of the present epoch from the present position, then of whole epochs.

    Loaders draw ahead of training, so what the sampler has yielded says nothing about what was trained on. With
    `progress` the position at which an iteration starts, and that is saved, follows from the batches trained on;
    without it, each iteration goes to the end of the epoch and the next one starts after it. The length is always
    that of a whole epoch.

    Args:
        size: number of samples in the data set.
        batch_size: samples in one batch of one rank.
        accumulated: batches of each rank whose gradients make one step; an epoch has whole steps, and those batches are
            the same samples however many ranks share them and however many batches they are taken in.
        shuffle: without it the order is the same in every epoch; mixed, so that the first batches stand for all.
        drop_last: leave out the remainder, so that every rank gets whole batches; without it one that has not a sample
            for each rank alone, so that all have equally many batches, as sharded weights want it.
        max_batches: an epoch ends after this many batches of each rank.
        progress: number of batches that were trained on since the start, or since the loaded state.
        arrange: rearranges the order of an epoch, given (order, epoch, samples in a step of all ranks).
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        batch_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        max_batches: int | None = None,
        progress: Callable[[], int] | None = None,
        arrange: Arrangement | None = None,
        accumulated: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self._unit = batch_size * world_size
        self._step = self._unit * accumulated
        whole_batches = size // self._step * accumulated
        whole_only = drop_last or (whole_batches > 0 and size % self._unit < world_size)
        self.samples_per_epoch = whole_batches * self._unit if whole_only else size
        if self.samples_per_epoch == 0:
            raise ValueError(few_samples(size, self._step))
        self.batches_per_epoch = max(1, whole_batches if max_batches is None else min(whole_batches, max_batches))
        self._progress = progress
        self._arrange = arrange
        self._start = Position()

    def __len__(self) -> int:
        return len(range(self.rank, self.samples_per_epoch, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, consumed = self.position
        for index in self._order(epoch)[consumed + self.rank : self.samples_per_epoch : self.world_size].tolist():
            yield SampleKey(index, epoch)
        if self._progress is None:
            self._start = Position(epoch + 1)

    @property
    def position(self) -> Position:
        """Where the next iteration starts."""
        if self._progress is None:
            return self._start
        batches = self._start.consumed // self._unit + self._progress()
        epochs, batches = divmod(batches, self.batches_per_epoch)
        return Position(self._start.epoch + epochs, batches * self._unit)

    def state_dict(self) -> SamplerState:
        """The present position."""
        epoch, consumed = self.position
        return {"epoch": epoch, "consumed": consumed, "size": self.size}

    def load_state_dict(self, state: SamplerState) -> None:
        """Continue from `state`; with another data set its epoch begins anew, and a warning says so."""
        self._start = Position(state["epoch"], state["consumed"])
        if state["size"] != self.size:
            self._start = Position(state["epoch"])
            _log.warning(
                "the data set has %d samples, and had %d when the state was saved: epoch %d begins anew",
                self.size,
                state["size"],
                state["epoch"],
            )

    def _order(self, epoch: int) -> np.ndarray:
        order = numpy_generator("order", self.seed, epoch if self.shuffle else 0).permutation(self.size)
        return order if self._arrange is None else self._arrange(order, epoch, self._step)


@dataclass(frozen=True)
class LengthBuckets:
    """Rearranges a sampler's order (an `Arrangement`); a function of (seed, epoch, order) alone.

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


def even_share(batch_size: int, devices: int, accumulated: int = 1, accumulates: bool = True) -> int:
    """Samples on a device at a time, where a step of `batch_size` is shared out, and taken in `accumulated` batches.

    Raises ValueError where that does not come out even, with the settings that keep the sum; among them accumulation
    where the task `accumulates`.

    >>> even_share(128, devices=8), even_share(128, devices=2, accumulated=4)
    (16, 16)
    """
    share, rest = divmod(batch_size, devices * accumulated)
    if not rest:
        return share
    fewer = next(count for count in range(min(devices, batch_size), 0, -1) if batch_size % count == 0)
    own = batch_size // fewer
    # No more at a time than was asked for.
    enough = (n for n in range(1, own + 1) if own % n == 0 and own // n <= max(share, 1))
    batches = next(enough) if accumulates else 1
    keeps = [f"trainer.devices={fewer}"] * (fewer < devices) + [
        f"trainer.accumulate_grad_batches={batches}"
    ] * accumulates
    parts = f" in {accumulated} batches each" if accumulated > 1 else ""
    raise ValueError(
        f"data.batch_size={batch_size} is the sum over devices and does not divide among {devices} of them{parts}: set "
        f"a multiple, such as data.batch_size={(share + 1) * devices * accumulated}, or keep the sum by "
        f"{' '.join(keeps)}, with {own // batches} at a time on each of {fewer} devices in all"
    )


def few_samples(size: int, batch_size: int) -> str:
    """What to say of a data set for training that is smaller than a batch of all devices together."""
    mend = f"set data.batch_size={size} or less, or add clips" if size else "add clips"
    return f"{size} samples do not fill one batch of {batch_size} (data.batch_size, over all devices): {mend}"


def padding_fraction(lengths: NDArray[np.generic], order: NDArray[np.int64], batch_size: int) -> float:
    """The share of padding in whole batches that are as long as their longest clip."""
    batches = lengths[order[: len(order) // batch_size * batch_size]].reshape(-1, batch_size)
    return float(1 - batches.sum() / (batches.max(axis=1).sum() * batch_size))


def evenly_spaced(size: int, count: int) -> list[int]:
    """At most `count` indices into `size` items, spread evenly from the first item on."""
    chosen = min(count, size)
    return [index * size // chosen for index in range(chosen)]
