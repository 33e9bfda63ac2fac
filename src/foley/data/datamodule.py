"""What a training run reads: the Lightning data modules of captioned audio and of cached latents."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from foley.core.channels import channels_of
from foley.core.embeddings import EmbeddingStore
from foley.core.logs import get_logger
from foley.core.rates import clip_size
from foley.data.dataset import AudioCollate, AudioDataset, AudioSource, Augmentation, PeakLevel, RmsLevel
from foley.data.latents import LatentCacheIndex, LatentCollate, LatentDataset, captions
from foley.data.manifest import known_splits
from foley.data.resumable import ResumableDataModule
from foley.data.splits import renamed_splits

_log = get_logger(__name__)

_STEP_SECONDS = 0.1
"""Lengths of bucketed batches are multiples of this: longer than the windows of spectral losses, and few shapes."""


class AudioDataModule(ResumableDataModule):
    """Batches of captioned audio (`AudioBatch`).

    Args:
        splits: a source by split name; "train" is needed, "val" and "test" are optional.
        sample_rate_hz, channels: of every source.
        duration_seconds: length of every batch item; longer clips are cropped, at random in training.
        batch_size: of a step (see `ResumableDataModule`).
        level: see `AudioDataset`, as are `drop_silent` and `max_fault_fraction`.
        augmentation: in training only.
        bucket_batches: batches of similar length, padded to their longest item (see `ResumableDataModule`).

    Raises:
        ValueError: a source has another sample rate or number of channels, or a split is none that we know.
    """

    def __init__(
        self,
        splits: Mapping[str, AudioSource],
        sample_rate_hz: int,
        duration_seconds: float,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        level: PeakLevel | RmsLevel | None = None,
        augmentation: Augmentation | None = None,
        drop_silent: bool = False,
        max_fault_fraction: float = 0.05,
        pin_memory: bool = False,
        bucket_batches: int | None = None,
        channels: int = 1,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, pin_memory, bucket_batches)
        splits = renamed_splits(splits)
        for name, source in splits.items():
            if source.sample_rate_hz != sample_rate_hz:
                raise ValueError(f"split {name!r} is at {source.sample_rate_hz} Hz, expected {sample_rate_hz} Hz")
            if (own := channels_of(source)) != channels:
                raise ValueError(f"split {name!r} has clips of {own} channels, expected {channels} (data.channels)")
        self.splits = splits
        self.sample_rate_hz = sample_rate_hz
        self.duration_seconds = duration_seconds
        self.level = level
        self.drop_silent = drop_silent
        self.max_fault_fraction = max_fault_fraction
        self.num_samples = round(duration_seconds * self.sample_rate_hz)
        fixed = bucket_batches is None
        self.collate = AudioCollate(self.num_samples if fixed else None, round(_STEP_SECONDS * sample_rate_hz))
        self.datasets = {
            name: self._dataset(source, self.num_samples, augmentation if name == "train" else None, name == "train")
            for name, source in splits.items()
        }

    def whole_clips(self, max_duration_seconds: float) -> dict[str, AudioDataset]:
        """By split, the clips from their start, levelled as in training, not augmented: what is encoded to latents."""
        num_samples = round(max_duration_seconds * self.sample_rate_hz)
        return {name: self._dataset(source, num_samples, None, False) for name, source in self.splits.items()}

    def teardown(self, stage: str) -> None:
        """Say how many clips each split has skipped, on this rank, when all is done."""
        for name, dataset in cast(dict[str, AudioDataset], self.datasets).items():
            if count := dataset.num_faults:
                _log.warning("%s: %d of %d clips could not be used and were skipped", name, count, len(dataset))

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
        cache_dir: what `scripts/encode_latents.py` wrote, a folder or an fsspec URL.
        duration_seconds: length of every batch item; longer latents are cropped, at random in training.
        batch_size: of a step (see `ResumableDataModule`).
        bucket_batches: batches of similar length, padded to their longest item (see `ResumableDataModule`).
        repeats: weights of sources in training: by the beginning of a clip's id, how often it occurs in an epoch.
        text_dir: the captions' embeddings, which `scripts/encode_text.py` wrote, a folder or an fsspec URL.
        drops_longer: longer latents are left out instead of cropped: of a word with silence behind it most crops are
            silent.

    Raises:
        LatentCacheError: `cache_dir` is no latent cache, or has no clip that is short enough.
        TextStoreError: `text_dir` is no finished text store, or lacks captions.
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
        repeats: Mapping[str, int] | None = None,
        text_dir: str | None = None,
        drops_longer: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, pin_memory, bucket_batches)
        self.index = LatentCacheIndex.read(cache_dir)
        self.text = None if text_dir is None else EmbeddingStore.open(text_dir)
        if self.text is not None:
            self.text.require(captions(self.index))
        self.duration_seconds = duration_seconds
        _, self.num_frames = clip_size(duration_seconds, self.index.sample_rate_hz, self.index.hop_samples)
        self.collate = LatentCollate(self.num_frames if bucket_batches is None else None)
        self.datasets = {
            name: self._dataset(split, name == "train", repeats if name == "train" else None, drops_longer)
            for name, split in known_splits(self.index.splits).items()
        }

    def _dataset(
        self, split: str, training: bool, repeats: Mapping[str, int] | None, drops_longer: bool
    ) -> LatentDataset:
        return LatentDataset(
            self.index, split, self.num_frames, self.seed, training, repeats, self.text, drops_longer=drops_longer
        )

    @property
    def codec_hash(self) -> str:
        """Of the codec that encoded the cache."""
        return self.index.codec_hash

    @property
    def content_hash(self) -> str:
        """Of ids, splits and lengths of the clips: another folder of the same latents has the same one."""
        return self.index.content_hash

    @property
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[C]` of the training split, for `LatentNormaliser.set`."""
        return self.index.statistics

    def require_codec(self, codec_hash: str) -> None:
        """Raise StaleCacheError where another codec than this one made the cache."""
        self.index.require_codec(codec_hash)
