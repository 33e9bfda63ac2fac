"""A folder of encoded clips: safetensors shards, and an index that names the codec that made them.

A shard holds `mean` and `std` of the posterior, float16 `[frames, C]`, clip after clip. The folder appears under its
name only when it is complete.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
