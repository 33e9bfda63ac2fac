"""Loaders for a Lightning trainer (`use_distributed_sampler=False`), continued exactly after a restart."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.loops.progress import _ProcessedTracker
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foley.data.augment import Augmentation, PeakLevel, RmsLevel
from foley.data.dataset import AudioCollate, AudioDataset
from foley.data.latent_cache import LatentCacheIndex
from foley.data.latents import LatentCollate, LatentDataset
from foley.data.sampler import ResumableSampler, SamplerState
from foley.data.types import AudioSource


class ResumableDataModule(pl.LightningDataModule):
    """Loaders by split, and the state that continues training at the next batch.

    The state is read off the trainer's progress, so batches that loaders have drawn ahead are not counted. Every
    epoch of training has a new order; validation and test keep theirs.

    Args:
        batch_size: samples in one batch of one rank.
        num_workers: loader processes; they persist between epochs. 0 loads in the training process.
    """

    collate: Callable[..., Any]

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0, pin_memory: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.datasets: dict[str, Dataset[Any]] = {}
        self._train_sampler: ResumableSampler | None = None

    @property
    def train_sampler(self) -> ResumableSampler:
        """The sampler of the training loader, made once so that a loaded state reaches it."""
        if self._train_sampler is None:
            self._train_sampler = self._sampler("train", shuffle=True, drop_last=True)
        return self._train_sampler

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self.train_sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """The place in the order of samples after the batches that training has processed."""
        if self.trainer is None:
            return {}
        loop = self.trainer.fit_loop
        epochs = cast(_ProcessedTracker, loop.epoch_progress.current)
        between_epochs = epochs.processed == epochs.started
        epoch, batches = epochs.processed, 0
        if not between_epochs:
            batches = cast(_ProcessedTracker, loop.epoch_loop.batch_progress.current).processed
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        consumed = batches * self.batch_size * self.trainer.world_size
        return dict(self.train_sampler.state_dict(epoch, consumed))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_sampler.load_state_dict(cast(SamplerState, state_dict))

    def _evaluation_loader(self, split: str) -> DataLoader[Any] | list[Any]:
        if split not in self.datasets:
            return []
        return self._loader(split, self._sampler(split, shuffle=False, drop_last=False))

    def _sampler(self, split: str, shuffle: bool, drop_last: bool) -> ResumableSampler:
        if split not in self.datasets:
            raise ValueError(f"the data has no split {split!r}, only {sorted(self.datasets)}")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        size = len(self.datasets[split])  # type: ignore[arg-type]
        return ResumableSampler(size, self.seed, self.batch_size, shuffle, drop_last, rank, world_size)

    def _loader(self, split: str, sampler: ResumableSampler) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
        )


class AudioDataModule(ResumableDataModule):
    """Batches of captioned audio (`AudioBatch`).

    Args:
        splits: a source by split name; "train" is needed, "val" and "test" are optional.
        duration_seconds: length of every batch item; longer clips are cropped, at random in training.
        level: see `AudioDataset`, as are `drop_silent` and `max_fault_fraction`.
        augmentation: in training only.
    """

    def __init__(
        self,
        splits: Mapping[str, AudioSource],
        duration_seconds: float,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        level: PeakLevel | RmsLevel | None = None,
        augmentation: Augmentation | None = None,
        drop_silent: bool = False,
        max_fault_fraction: float = 0.05,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, pin_memory)
        self.splits = splits
        self.sample_rate_hz = next(iter(splits.values())).sample_rate_hz
        self.duration_seconds = duration_seconds
        self.level = level
        self.drop_silent = drop_silent
        self.max_fault_fraction = max_fault_fraction
        self.num_samples = round(duration_seconds * self.sample_rate_hz)
        self.collate = AudioCollate(self.num_samples)
        self.datasets = {
            name: self._dataset(source, self.num_samples, augmentation if name == "train" else None, name == "train")
            for name, source in splits.items()
        }

    def whole_clips(self, max_duration_seconds: float) -> dict[str, AudioDataset]:
        """By split, the clips from their start, levelled as in training, not augmented: what is encoded to latents."""
        num_samples = round(max_duration_seconds * self.sample_rate_hz)
        return {name: self._dataset(source, num_samples, None, False) for name, source in self.splits.items()}

    def _dataset(
        self, source: AudioSource, num_samples: int, augmentation: Augmentation | None, random_crop: bool
    ) -> AudioDataset:
        return AudioDataset(
            source,
            num_samples,
            self.seed,
            self.level,
            augmentation,
            random_crop,
            self.drop_silent,
            self.max_fault_fraction,
        )


class LatentDataModule(ResumableDataModule):
    """Batches of cached latents (`LatentBatch`), sampled from the codec's posterior anew in every epoch.

    Args:
        cache_dir: what `scripts/encode_latents.py` wrote.
        duration_seconds: length of every batch item; longer latents are cropped, at random in training.
        expected_codec_hash: of the codec that training will decode with; None accepts any.

    Raises:
        StaleCacheError: the cache was made by another codec.
    """

    def __init__(
        self,
        cache_dir: str,
        duration_seconds: float,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        expected_codec_hash: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, pin_memory)
        self.index = LatentCacheIndex.read(Path(cache_dir))
        if expected_codec_hash is not None:
            self.require_codec(expected_codec_hash)
        self.num_frames = max(1, round(duration_seconds * self.index.sample_rate_hz / self.index.hop_samples))
        self.collate = LatentCollate(self.num_frames)
        self.datasets = {
            split: LatentDataset(self.index, split, self.num_frames, seed, random=split == "train")
            for split in self.index.splits
        }

    @property
    def codec_hash(self) -> str:
        """Of the codec that encoded the cache."""
        return self.index.codec_hash

    @property
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[C]` of the training split, for `LatentNormaliser.set`."""
        return self.index.statistics

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError where another codec than this one made the cache."""
        self.index.require_codec(codec_hash)
