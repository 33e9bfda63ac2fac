"""A latent cache, safetensors shards and an index that names the codec that made them, and the data set it gives.

A shard holds `mean` and `std` of the posterior, float16 `[frames, C]`, clip after clip. Training samples the posterior,
crops and pads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from foley.core.logs import get_logger
from foley.core.seeding import numpy_generator, torch_generator
from foley.data.dataset import LatentBatch, SampleKey, crop_start, draw_caption, sample_key

_log = get_logger(__name__)

INDEX_FILE = "index.json"
FORMAT = "foley-latents-1"


class LatentCacheError(RuntimeError):
    """A latent cache that cannot be read or written; the message names the folder."""


class StaleCacheError(LatentCacheError):
    """A latent cache that another codec made."""


@dataclass(frozen=True)
class LatentEntry:
    """One clip: `num_frames` rows of shard `shard` from row `first_frame`; `duration_seconds` without padding."""

    id: str
    caption: str
    label: str
    split: str
    shard: str
    first_frame: int
    num_frames: int
    duration_seconds: float
    other_captions: Sequence[str] = ()


@dataclass(frozen=True)
class LatentCacheIndex:
    """What is in a cache, and which codec made it. `latent_mean` and `latent_std` `[C]` are of the training split."""

    directory: Path
    codec_hash: str
    sample_rate_hz: int
    hop_samples: int
    latent_mean: list[float]
    latent_std: list[float]
    entries: list[LatentEntry]

    @property
    def splits(self) -> list[str]:
        return sorted({entry.split for entry in self.entries})

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each `[C]`."""
        return torch.tensor(self.latent_mean), torch.tensor(self.latent_std)

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError unless the codec with this hash made the cache."""
        if codec_hash != self.codec_hash:
            raise StaleCacheError(
                f"{self.directory} was encoded by the codec {self.codec_hash}, but the codec in use is {codec_hash}; "
                "encode the latents again with it, or use the codec that made them"
            )

    @classmethod
    def read(cls, directory: Path) -> "LatentCacheIndex":
        """The index in `directory`; raises LatentCacheError where there is none that can be read."""
        path = directory / INDEX_FILE
        if not path.is_file():
            raise LatentCacheError(f"{path} does not exist: {directory} is no latent cache; encode the latents first")
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LatentCacheError(f"{path} is not valid JSON ({error}); encode the latents again") from error
        if stored.pop("format", None) != FORMAT:
            raise LatentCacheError(f"{path} is not of the format {FORMAT}; encode the latents again")
        return cls(directory, **{**stored, "entries": [LatentEntry(**entry) for entry in stored["entries"]]})


@dataclass(frozen=True)
class LatentItem:
    """One clip's `latent [C, L]`, not normalised, at its true number of frames."""

    latent: Tensor
    caption: str
    label: str
    id: str


class LatentDataset(Dataset[LatentItem]):
    """The latents of one split of a cache, keyed by `SampleKey`: item = f(seed, epoch, index).

    Shards are memory-mapped, so that processes share one copy.

    Args:
        num_frames: longest item L; longer latents are cropped, shorter ones are kept (`LatentCollate` pads).
        random: crop anywhere and sample the posterior; otherwise crop at the start and take the posterior's mean.
        repeats: by the beginning of a clip's id, how often it occurs in an epoch; once where no beginning fits.

    Raises:
        LatentCacheError: the cache has no such split.
    """

    def __init__(
        self,
        index: LatentCacheIndex,
        split: str,
        num_frames: int,
        seed: int = 0,
        random: bool = True,
        repeats: Mapping[str, int] | None = None,
    ) -> None:
        self.entries = _repeated([entry for entry in index.entries if entry.split == split], repeats or {})
        if not self.entries:
            raise LatentCacheError(f"{index.directory} has no split {split!r}, only {index.splits}")
        self.num_frames = num_frames
        self.seed = seed
        self.random = random
        names = {entry.shard for entry in self.entries}
        self._shards = {name: load_file(index.directory / name) for name in names}

    def __len__(self) -> int:
        return len(self.entries)

    def lengths(self, epoch: int) -> NDArray[np.int64]:
        """Frames `[N]` of the items, the same in every epoch."""
        return np.array([min(entry.num_frames, self.num_frames) for entry in self.entries])

    def __getitem__(self, key: SampleKey | int) -> LatentItem:
        index, epoch = sample_key(key)
        entry = self.entries[index]
        generator = numpy_generator("latent_crop", self.seed, epoch, index) if self.random else None
        start = entry.first_frame + crop_start(entry.num_frames, self.num_frames, generator)
        rows = slice(start, start + min(entry.num_frames, self.num_frames))
        shard = self._shards[entry.shard]
        latent = shard["mean"][rows].float()
        if self.random:
            noise = torch.randn(latent.shape, generator=torch_generator("posterior", self.seed, epoch, index))
            latent = latent + shard["std"][rows].float() * noise
        caption = draw_caption(entry, self.seed, SampleKey(index, epoch)) if self.random else entry.caption
        return LatentItem(latent.T, caption, entry.label, entry.id)


def _repeated(entries: list[LatentEntry], repeats: Mapping[str, int]) -> list[LatentEntry]:
    for beginning in repeats:
        if not any(entry.id.startswith(beginning) for entry in entries):
            _log.warning("data.repeats names %r, with which no clip's id begins: it has no effect", beginning)
    return [
        entry
        for entry in entries
        for _ in range(next((times for start, times in repeats.items() if entry.id.startswith(start)), 1))
    ]


class LatentCollate:
    """Items to a `LatentBatch` of `num_frames`, zero-padded at the end and masked; None pads to the longest."""

    def __init__(self, num_frames: int | None) -> None:
        self.num_frames = num_frames

    def __call__(self, items: Sequence[LatentItem]) -> LatentBatch:
        lengths = torch.tensor([item.latent.shape[1] for item in items])
        width = self.num_frames or int(lengths.max())
        padded = [functional.pad(item.latent, (0, width - item.latent.shape[1])) for item in items]
        return LatentBatch(
            latent=torch.stack(padded),
            frame_mask=torch.arange(width) < lengths[:, None],
            caption=[item.caption for item in items],
            label=[item.label for item in items],
            id=[item.id for item in items],
        )
