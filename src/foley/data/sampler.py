"""The order of samples: a permutation by (seed, epoch), shared out over ranks, continued exactly after a restart."""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
from torch.utils.data import Sampler

from foley.data.types import SampleKey
from foley.logs import get_logger
from foley.seeding import numpy_generator

_log = get_logger(__name__)


class SamplerState(TypedDict):
    """A place in the order: `consumed` samples, over all ranks, of `epoch` in a data set of `size`."""

    epoch: int
    consumed: int
    size: int


class ResumableSampler(Sampler[SampleKey]):
    """Yields this rank's `SampleKey`s: of the present epoch from where the loaded state stopped, then of whole epochs.

    The sampler does not count what it yields, because loaders draw ahead of training; whoever consumes the samples
    counts and passes the number to `state_dict`. Its length is always that of a whole epoch.

    Args:
        size: number of samples in the data set.
        shuffle: without it the order is 0, 1, 2, ... in every epoch.
        drop_last: leave out the remainder, so that every rank gets whole batches; without it ranks may differ by one.
        batch_size: samples in one batch of one rank.
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
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        unit = batch_size * world_size
        self.samples_per_epoch = size // unit * unit if drop_last else size
        if self.samples_per_epoch == 0:
            raise ValueError(f"{size} samples do not fill one batch of {batch_size} on each of {world_size} ranks")
        self.epoch = 0
        self._consumed = 0

    def __len__(self) -> int:
        return len(range(self.rank, self.samples_per_epoch, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, start = self.epoch, self._consumed + self.rank
        for index in self._order(epoch)[start : self.samples_per_epoch : self.world_size].tolist():
            yield SampleKey(index, epoch)
        self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; nothing happens where that is the present one, so a loaded position is kept."""
        if epoch != self.epoch:
            self.epoch, self._consumed = epoch, 0

    def state_dict(self, epoch: int, consumed: int) -> SamplerState:
        """The position after `consumed` samples, over all ranks, of `epoch`; after all of them it is the next epoch."""
        if consumed >= self.samples_per_epoch:
            epoch, consumed = epoch + 1, 0
        return {"epoch": epoch, "consumed": consumed, "size": self.size}

    def load_state_dict(self, state: SamplerState) -> None:
        """Continue from `state`; with another data set its epoch begins anew, and a warning says so."""
        self.epoch, self._consumed = state["epoch"], state["consumed"]
        if state["size"] != self.size:
            self._consumed = 0
            _log.warning(
                "the data set has %d samples, and had %d when the state was saved: epoch %d begins anew",
                self.size,
                state["size"],
                self.epoch,
            )

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return numpy_generator("order", self.seed, epoch).permutation(self.size)
