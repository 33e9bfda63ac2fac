"""A folder of encoded clips: safetensors shards, and an index that names the codec that made them.

A shard holds `mean` and `std` of the posterior, float16 `[frames, C]`, clip after clip. The folder appears under its
name only when it is complete.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from foley.checkpoint import atomic_write, write_json

INDEX_FILE = "index.json"
FORMAT = "foley-latents-1"
_FRAMES_PER_SHARD = 1 << 19


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


class LatentCacheWriter:
    """Collects encoded clips and writes full shards; `finish` writes the index. Use through `latent_cache_writer`."""

    def __init__(self, directory: Path, codec_hash: str, sample_rate_hz: int, hop_samples: int) -> None:
        self._directory = directory
        self._about = {"codec_hash": codec_hash, "sample_rate_hz": sample_rate_hz, "hop_samples": hop_samples}
        self._entries: list[LatentEntry] = []
        self._means: list[Tensor] = []
        self._stds: list[Tensor] = []
        self._frames = 0
        self._num_shards = 0
        self._statistics = _RunningStatistics()

    def add(
        self, mean: Tensor, std: Tensor, id: str, caption: str, label: str, split: str, duration_seconds: float
    ) -> None:
        """Append one clip's posterior, each `[C, L]`; raises LatentCacheError where float16 cannot hold it."""
        halves = [tensor.T.to("cpu", torch.float16) for tensor in (mean, std)]
        if not all(bool(half.isfinite().all()) for half in halves):
            raise LatentCacheError(
                f"clip {id!r} has a posterior that float16 cannot hold: mean up to {mean.abs().max()}"
            )
        entry = LatentEntry(id, caption, label, split, self._shard, self._frames, mean.shape[1], duration_seconds)
        self._entries.append(entry)
        self._means.append(halves[0])
        self._stds.append(halves[1])
        self._frames += mean.shape[1]
        if split == "train":
            self._statistics.add(*halves)
        if self._frames >= _FRAMES_PER_SHARD:
            self._write_shard()

    def finish(self) -> None:
        """Write what is left, and the index; raises LatentCacheError where nothing was encoded for training."""
        if self._means:
            self._write_shard()
        mean, std = self._statistics.result()
        entries = sorted(self._entries, key=lambda entry: (entry.split, entry.id))
        write_json(
            self._directory / INDEX_FILE,
            {
                "format": FORMAT,
                **self._about,
                "latent_mean": mean.tolist(),
                "latent_std": std.tolist(),
                "entries": [dataclasses.asdict(entry) for entry in entries],
            },
        )

    @property
    def _shard(self) -> str:
        return f"latents-{self._num_shards:05d}.safetensors"

    def _write_shard(self) -> None:
        tensors = {"mean": torch.cat(self._means), "std": torch.cat(self._stds)}
        atomic_write(self._directory / self._shard, lambda temporary: save_file(tensors, temporary))
        self._num_shards += 1
        self._means, self._stds, self._frames = [], [], 0


class _RunningStatistics:
    """Mean and standard deviation per channel of posterior samples: variance = var(mean) + E[std^2]."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, mean: Tensor, std: Tensor) -> None:
        mean, std = mean.double(), std.double()
        self._count += len(mean)
        self._sum = self._sum + mean.sum(0)
        self._square = self._square + (mean.square() + std.square()).sum(0)

    def result(self) -> tuple[Tensor, Tensor]:
        if not isinstance(self._sum, Tensor) or not isinstance(self._square, Tensor):
            raise LatentCacheError("no clip of the split 'train' was encoded: there are no latent statistics")
        mean = self._sum / self._count
        return mean, (self._square / self._count - mean.square()).clamp_min(0.0).sqrt()


@contextmanager
def latent_cache_writer(
    directory: Path, codec_hash: str, sample_rate_hz: int, hop_samples: int
) -> Iterator[LatentCacheWriter]:
    """A writer of the cache `directory`, which replaces an older cache there only after a clean exit.

    Raises:
        LatentCacheError: `directory` holds something that is not a latent cache.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / INDEX_FILE).is_file():
        raise LatentCacheError(f"{directory} holds files that are not a latent cache; choose another output directory")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = LatentCacheWriter(partial, codec_hash, sample_rate_hz, hop_samples)
        yield writer
        writer.finish()
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
