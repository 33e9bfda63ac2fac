"""Pairs of sounds of one prompt, of which one is preferred: a file beside the latents of all, and the data of training.

    index.json, clips.safetensors, latents-*.safetensors   a latent cache, see `foley.data.latent_format`
    preferences.json                                       the pairs by ids of its clips, and which latents these are

`foley.generation.preferences` makes both; pairs that people chose are written by `Preferences.write`.
"""

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from foley.core.files import write_json
from foley.core.hashing import hash_json
from foley.core.ranges import filesystem_of
from foley.core.reading import parse_json, reading
from foley.data.datamodule import LatentDataModule
from foley.data.dataset import LatentBatch, SampleKey
from foley.data.latents import LatentCacheIndex, LatentCollate, LatentDataset, LatentEntries, LatentItem

PREFERENCES_FILE = "preferences.json"
FORMAT = "foley-preferences-1"
_PAIRS, _AGAIN = "the pairs of a folder of preferences", "remove it; the same foley prefer ranks the sounds again"


class PreferenceError(RuntimeError):
    """Pairs that cannot be trained on; the message names the folder."""


@dataclass(frozen=True)
class Preference:
    """A pair by the ids of its clips, and what the reward made of each, where there was one."""

    winner: str
    loser: str
    winner_reward: float | None = None
    loser_reward: float | None = None


@dataclass(frozen=True)
class Preferences:
    """The pairs of a latent cache.

    Args:
        latents_hash: `hash_of_latents` of that cache.
        pairs: of clips of equal length and of one split.
        facts: how they came about: which reward, of how many sounds.
    """

    latents_hash: str
    pairs: Sequence[Preference]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Beside the latents."""
        rows = [asdict(pair) for pair in self.pairs]
        about = {"format": FORMAT, "latents_sha256": self.latents_hash, **self.facts, "pairs": rows}
        write_json(folder / PREFERENCES_FILE, about)

    @classmethod
    def read(cls, index: LatentCacheIndex) -> "Preferences":
        """Those beside a cache, wherever it lies.

        Raises PreferenceError where there are none, or they are of other latents, and DamagedFileError.
        """
        where = f"{index.url}/{PREFERENCES_FILE}"
        filesystem, root = filesystem_of(index.url, os.getpid())
        try:
            content: bytes = filesystem.cat_file(f"{root}/{PREFERENCES_FILE}")
        except FileNotFoundError as error:
            raise PreferenceError(
                f"{where} does not exist: {index.url} holds latents, but no pairs; foley prefer makes both"
            ) from error
        with reading(where, _PAIRS, _AGAIN):
            stored = dict(parse_json(content.decode(), where, _PAIRS, _AGAIN))
            if stored.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            rows = [Preference(**row) for row in stored.pop("pairs")]
            found = cls(stored.pop("latents_sha256"), rows, stored)
        if found.latents_hash != hash_of_latents(index):
            raise PreferenceError(
                f"{where} holds pairs of other latents ({found.latents_hash[:12]}) than lie beside it "
                f"({hash_of_latents(index)[:12]}); put those back, or {_AGAIN}"
            )
        return found

    @property
    def content_hash(self) -> str:
        """Of latents and pairs: of what a run was trained on, wherever it lies."""
        return hash_json([self.latents_hash, [[pair.winner, pair.loser] for pair in self.pairs]])


def hash_of_latents(index: LatentCacheIndex) -> str:
    """Of the clips of a cache and of the latents themselves: those of another seed have the same ids."""
    return hash_json([index.clips_sha256, [shard.sha256 for shard in index.shards]])


class PairBatch(LatentBatch):
    """A `LatentBatch` of winners, and the `loser [B, C, L]` of each, with the same frames and caption."""

    loser: Tensor


@dataclass(frozen=True)
class PairItem:
    """Winner and loser of a prompt."""

    winner: LatentItem
    loser: LatentItem


class PairDataset(Dataset[PairItem]):
    """The pairs among the clips of a split: item = f(seed, epoch, index), both cropped alike.

    Args:
        clips: all of the split.
        pairs: those of other splits are left out.

    Raises PreferenceError for a pair of clips of unequal length.
    """

    def __init__(self, clips: LatentDataset, pairs: Sequence[Preference]) -> None:
        table = clips.entries.cache.clips
        rows = {table.id[int(row)]: int(row) for row in clips.entries.rows}
        own = [pair for pair in pairs if pair.winner in rows and pair.loser in rows]
        chosen = np.array([[rows[pair.winner], rows[pair.loser]] for pair in own], np.int32).reshape(-1, 2)
        frames = table.num_frames[chosen]  # [N, 2]
        if len(uneven := np.flatnonzero(frames[:, 0] != frames[:, 1])):
            pair, lengths = own[int(uneven[0])], frames[int(uneven[0])].tolist()
            raise PreferenceError(f"{pair.winner} and {pair.loser} are no pair: {lengths} frames; generate equal ones")
        self.winners, self.losers = (_at(clips, part) for part in chosen.T)
        self.losers.text = None  # the caption is the winner's

    def __len__(self) -> int:
        return len(self.winners)

    def lengths(self, epoch: int) -> NDArray[np.int64]:
        """Frames `[N]` of the items."""
        return self.winners.lengths(epoch)

    def __getitem__(self, key: SampleKey | int) -> PairItem:
        return PairItem(self.winners[key], self.losers[key])

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[PairItem]:
        """The items of a batch, asked for together."""
        both = zip(self.winners.__getitems__(keys), self.losers.__getitems__(keys), strict=True)
        return [PairItem(winner, loser) for winner, loser in both]


def _at(clips: LatentDataset, rows: NDArray[np.int32]) -> LatentDataset:
    """The same data set, of the clips at these rows of the table, in their order."""
    chosen = copy(clips)
    chosen.entries = LatentEntries(clips.entries.cache, rows)
    return chosen


class PairCollate:
    """Pairs to a `PairBatch`."""

    def __init__(self, collate: LatentCollate) -> None:
        self._collate = collate

    def __call__(self, items: Sequence[PairItem]) -> PairBatch:
        winners, losers = (
            self._collate(list(part)) for part in zip(*((i.winner, i.loser) for i in items), strict=True)
        )
        return PairBatch(**winners, loser=losers["latent"])


class PreferenceDataModule(LatentDataModule):
    """Batches of pairs (`PairBatch`); a step is of `batch_size` pairs, each of two latents.

    Args:
        cache_dir: what `scripts/make_preferences.py` wrote, a folder or an fsspec URL.
        duration_seconds, batch_size, num_workers, seed, pin_memory, bucket_batches, text_dir: as for
            `LatentDataModule`.

    Raises as `LatentDataModule` and `Preferences.read` do, and PreferenceError where no pair is for training.
    """

    def __init__(
        self,
        cache_dir: str,
        duration_seconds: float,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
        bucket_batches: int | None = None,
        text_dir: str | None = None,
    ) -> None:
        loading = batch_size, num_workers, seed, pin_memory, bucket_batches
        super().__init__(cache_dir, duration_seconds, *loading, text_dir=text_dir)
        self.preferences = Preferences.read(self.index)
        clips = cast(dict[str, LatentDataset], self.datasets)
        pairs = {name: PairDataset(dataset, self.preferences.pairs) for name, dataset in clips.items()}
        self.datasets = {name: dataset for name, dataset in pairs.items() if len(dataset)}
        if "train" not in self.datasets:
            raise PreferenceError(
                f"{self.index.url} holds no pair of the split 'train' (of {len(self.preferences.pairs)} in all): where "
                "all sounds of a prompt are as good, nothing is preferred; generate more of each, or lower least_gap"
            )
        self.collate = PairCollate(cast(LatentCollate, self.collate))

    @property
    def content_hash(self) -> str:
        """Of latents and pairs."""
        return self.preferences.content_hash
