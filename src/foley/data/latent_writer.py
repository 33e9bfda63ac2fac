"""Writes a latent cache: full shards as they fill, the index last, the folder under its name only when complete."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from foley.data.latent_cache import FORMAT, INDEX_FILE, LatentCacheError, LatentEntry
from foley.files import write_json, write_tensors

_FRAMES_PER_SHARD = 1 << 19


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
        write_tensors(self._directory / self._shard, tensors)
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
        _swap(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, directory: Path) -> None:
    """Put `new` in the place of `directory`; a process killed in between leaves the old cache as `.name.old`."""
    old = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
