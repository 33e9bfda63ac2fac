"""Clips ready for training: what travels through the data layer, then level, crop and augmentation, then batches.

Clips that cannot be used are replaced by the next good one, and counted.
"""

import logging
import math
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from foley.core.channels import SILENCE_PEAK
from foley.core.logs import get_logger
from foley.core.seeding import derive_seed, numpy_generator
from foley.data.audio import AudioError, check_samples

_log = get_logger(__name__)

_MAX_NAMED = 5


@dataclass(frozen=True)
class AudioItem:
    """One captioned clip: `audio [T]`, float32 in [-1, 1], at its source's sample rate and true length.

    `[channels, T]` of a source that has several.

    Training draws one of `caption` and `other_captions` in every epoch; all else takes `caption`.
    """

    audio: Tensor
    caption: str
    label: str = ""
    id: str = ""
    other_captions: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """T."""
        return self.audio.shape[-1]


class AudioSource(Protocol):
    """A map-style collection of clips (files, procedural sounds, a mixture).

    `render` is a function of (index, epoch) alone, so that order, workers and resumption do not matter.
    A source that cannot produce item `index` raises `AudioError` (`foley.data.audio`).
    """

    sample_rate_hz: int

    def __len__(self) -> int: ...

    def render(self, index: int, epoch: int) -> AudioItem: ...


@runtime_checkable
class TimedSource(Protocol):
    """A source that knows the durations `[N]` of its clips without reading them."""

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]: ...


@runtime_checkable
class NamedSource(Protocol):
    """A source that names its clips without reading them: one name for one clip, wherever it lies in the source."""

    def clip_name(self, index: int) -> str: ...


def clip_name(source: AudioSource, index: int) -> str:
    """Of clip `index` (in epoch 0), by which work on it is continued; its index where the source has no names."""
    return source.clip_name(index) if isinstance(source, NamedSource) else str(index)


@runtime_checkable
class CheckedSource(Protocol):
    """A source whose files were looked at (`foley.data.preflight`): what is wrong, each with its path."""

    @property
    def known_faults(self) -> Sequence[str]: ...


def known_faults(source: AudioSource) -> Sequence[str]:
    """What is known to be wrong with clips of `source` before any is read; nothing where nobody looked."""
    return source.known_faults if isinstance(source, CheckedSource) else ()


def durations_seconds(source: AudioSource, epoch: int) -> NDArray[np.float32]:
    """Of the clips that `source` renders in `epoch`; raises ValueError where it does not know them."""
    if not isinstance(source, TimedSource):
        raise ValueError(f"{type(source).__name__} does not know how long its clips are; turn off bucket_batches")
    return source.durations_seconds(epoch)


class SampleKey(NamedTuple):
    """What samplers yield: all randomness of an item is keyed by (seed, epoch, index)."""

    index: int  # type: ignore[assignment]  # a named tuple may hide `tuple.index`
    epoch: int = 0


def sample_key(key: SampleKey | int) -> SampleKey:
    """`key`, or the key of an index in epoch 0: loaders that bring their own sampler give plain indices."""
    return key if isinstance(key, SampleKey) else SampleKey(key)


class AudioBatch(TypedDict):
    """`audio [B, channels, T]` zero-padded at the end; `length_samples [B]` (long) says where the padding starts."""

    audio: Tensor
    length_samples: Tensor
    caption: list[str]
    label: list[str]
    id: list[str]


class LatentBatch(TypedDict):
    """`latent [B, C, L]` zero-padded at the end; `frame_mask [B, L]` is true on real frames.

    `is_padded` says whether it is false anywhere: to look into a mask on a device would wait for it. Where the
    captions' embeddings are stored, `context [B, S, Dc]` holds them, with `context_mask [B, S]`.
    """

    latent: Tensor
    frame_mask: Tensor
    is_padded: bool
    caption: list[str]
    label: list[str]
    id: list[str]
    context: NotRequired[Tensor]
    context_mask: NotRequired[Tensor]


class Captioned(Protocol):
    """What has a caption, and perhaps others."""

    @property
    def caption(self) -> str: ...

    @property
    def other_captions(self) -> Sequence[str]: ...


def draw_caption(clip: Captioned, seed: int, key: SampleKey) -> str:
    """One of the clip's captions, by the seed, the epoch and the index."""
    captions = (clip.caption, *clip.other_captions)
    return captions[derive_seed("caption", seed, key.epoch, key.index) % len(captions)]


def is_silent(audio: Tensor) -> bool:
    """Whether no sample of `audio [..., T]` rises above `SILENCE_PEAK`."""
    return bool(audio.abs().amax() < SILENCE_PEAK)


@dataclass(frozen=True)
class PeakLevel:
    """Scales a clip so that its largest sample is at `peak_db` of full scale; a silent clip is left as it is."""

    peak_db: float = -1.0

    def __call__(self, audio: Tensor) -> Tensor:
        return audio * self.gain(audio)

    def gain(self, audio: Tensor) -> float:
        """By what `audio` is multiplied; 1 where it is silent."""
        peak = float(audio.abs().amax())
        return 1.0 if peak < SILENCE_PEAK else decibels_to_gain(self.peak_db) / peak


@dataclass(frozen=True)
class RmsLevel:
    """Scales a clip to a root mean square of `rms_db`, or less where its peaks would pass `peak_db`."""

    rms_db: float = -20.0
    peak_db: float = -1.0

    def __call__(self, audio: Tensor) -> Tensor:
        peak = float(audio.abs().amax())
        if peak < SILENCE_PEAK:
            return audio
        rms = float(audio.square().mean().sqrt())
        return audio * min(decibels_to_gain(self.rms_db) / rms, decibels_to_gain(self.peak_db) / peak)


@dataclass(frozen=True)
class Augmentation:
    """Random polarity and attenuation.

    Args:
        phase_flip_probability: of turning the waveform upside down, which no ear hears.
        max_attenuation_db: a gain uniform in [-max_attenuation_db, 0] dB.
    """

    phase_flip_probability: float = 0.5
    max_attenuation_db: float = 6.0

    def __call__(self, audio: Tensor, generator: np.random.Generator) -> Tensor:
        flip, attenuation = generator.random(2)
        gain = decibels_to_gain(-attenuation * self.max_attenuation_db)
        return audio * (-gain if flip < self.phase_flip_probability else gain)


def crop_start(length: int, crop_length: int, generator: np.random.Generator | None) -> int:
    """Where a crop of `crop_length` out of `length` starts: anywhere, or at 0 without a generator."""
    room = length - crop_length
    return 0 if generator is None or room <= 0 else int(generator.integers(room + 1))


def decibels_to_gain(decibels: float) -> float:
    """20 dB are a factor of 10."""
    return math.pow(10.0, decibels / 20.0)


def gain_to_decibels(gain: float) -> float:
    """A factor of 10 is 20 dB; to three decimals."""
    return round(20 * math.log10(gain), 3)


class DataFaultError(RuntimeError):
    """So many clips cannot be used that training should not go on."""


class AudioDataset(Dataset[AudioItem]):
    """Crops of the clips of `source`, keyed by `SampleKey`: item = f(seed, epoch, index).

    An item that cannot be used (see `AudioError`) is replaced by the next usable index, the same one on every run.
    Faulty places are counted once, in all loader processes of a rank together (`num_faults`; `faults` has the reasons
    that this process met), and end the run when they are too many. Every rank counts what it reads itself.

    Args:
        num_samples: longest item T; longer clips are cropped, shorter ones kept (`AudioCollate` pads); None: no crop.
        level: `PeakLevel`, `RmsLevel` or None.
        augmentation: applied last; None for evaluation.
        random_crop: crop anywhere; otherwise at the start.
        drop_silent: count silent clips as faulty; otherwise they are kept, silent.
        max_fault_fraction: of the source's size; more faulty clips than that, and than one, raise `DataFaultError`: at
            once where the source knows of them, or when they are read.
    """

    def __init__(
        self,
        source: AudioSource,
        num_samples: int | None,
        seed: int = 0,
        level: PeakLevel | RmsLevel | None = None,
        augmentation: Augmentation | None = None,
        random_crop: bool = True,
        drop_silent: bool = False,
        max_fault_fraction: float = 0.05,
    ) -> None:
        self.source = source
        self.num_samples = num_samples
        self.seed = seed
        self.level = level
        self.augmentation = augmentation
        self.random_crop = random_crop
        self.drop_silent = drop_silent
        self.max_fault_fraction = max_fault_fraction
        self.faults: dict[str, str] = {}
        # In shared memory: a loader process, forked or spawned, marks what all of them see.
        self._faulty = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self._num_faults = multiprocessing.Value("q", 0)  # of those; its lock guards both
        known = known_faults(source)
        self._known = frozenset(known)
        self.refuse_too_many(len(known), known)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_faults(self) -> int:
        """Places of the source that could not be used so far; a mixture may hold one clip in several."""
        return self._num_faults.value

    def lengths(self, epoch: int) -> NDArray[np.float32]:
        """Seconds `[N]` of the items of `epoch`; raises ValueError where the source does not know them."""
        seconds = durations_seconds(self.source, epoch)
        limit = None if self.num_samples is None else self.num_samples / self.source.sample_rate_hz
        return seconds if limit is None else seconds.clip(max=limit)

    def __getitem__(self, key: SampleKey | int) -> AudioItem:
        """The item at `key`; raises DataFaultError."""
        index, epoch = sample_key(key)
        for candidate in (place % len(self) for place in range(index, index + len(self))):
            try:
                return self.load(SampleKey(candidate, epoch))
            except AudioError as error:
                self.count_fault(candidate, error)
        raise DataFaultError(
            f"none of {len(self)} clips can be used; check their paths: {_listing(self._met(), len(self))}"
        )

    def load(self, key: SampleKey) -> AudioItem:
        """The item at `key` itself; raises AudioError where it cannot be used."""
        return self.prepared(self.source.render(*key), key)

    def prepared(self, item: AudioItem, key: SampleKey) -> AudioItem:
        """A clip as it was read: its caption drawn, levelled, cropped, augmented; raises AudioError as `load` does."""
        check_samples(item.id, item.audio.numpy())
        if self.drop_silent and is_silent(item.audio):
            raise AudioError(item.id, "is silent")
        generator = numpy_generator("audio", self.seed, key.epoch, key.index)
        caption = draw_caption(item, self.seed, key) if self.random_crop else item.caption
        return replace(item, audio=self._prepare(item.audio, generator), caption=caption)

    def _prepare(self, audio: Tensor, generator: np.random.Generator) -> Tensor:
        level = audio if self.level is None else self.level(audio)
        if self.num_samples is not None:
            start = crop_start(level.shape[-1], self.num_samples, generator if self.random_crop else None)
            level = level[..., start : start + self.num_samples]
        return level if self.augmentation is None else self.augmentation(level, generator)

    def count_fault(self, index: int, error: AudioError) -> None:
        """Note a clip that cannot be used, with a warning unless its fault was known; raises DataFaultError."""
        self.faults[error.path] = error.reason
        with self._num_faults.get_lock():
            if self._faulty[index]:
                return
            self._faulty[index] = True
            self._num_faults.value += 1
            count = self._num_faults.value
        level = logging.DEBUG if str(error) in self._known else logging.WARNING
        _log.log(level, "skipping a clip (%d so far): %s", count, error)
        self.refuse_too_many(count, self._met())

    def _met(self) -> Iterator[str]:
        return (f"{path}: {reason}" for path, reason in self.faults.items())

    def refuse_too_many(self, count: int, faults: Iterable[str]) -> None:
        """Raise DataFaultError where `count` clips are more than may be of no use; `faults` names those it can."""
        if 0 < count == len(self):
            raise DataFaultError(f"none of {count} clips can be used; check their paths: {_listing(faults, count)}")
        if count <= most_faults(len(self), self.max_fault_fraction):
            return
        raise DataFaultError(
            f"{count} of {len(self)} clips cannot be used, more than the fraction {self.max_fault_fraction:g} "
            f"(data.max_fault_fraction); mend them, or raise it: {_listing(faults, count)}"
        )


def most_faults(num_clips: int, fraction: float) -> float:
    """How many of the clips may be faulty where that share may: one always.

    >>> most_faults(1000, 0.05), most_faults(3, 0.05)
    (50.0, 1.0)
    """
    return max(1.0, fraction * num_clips)


def _listing(faults: Iterable[str], count: int) -> str:
    """The first of `count` faults, each once; a process knows those that it met alone."""
    first = list(dict.fromkeys(faults))[:_MAX_NAMED]
    return "; ".join(first) + (f"; and {count - len(first)} more" if count > len(first) else "")


class AudioCollate:
    """Items to an `AudioBatch` of `num_samples`, zero-padded at the end; None pads to the longest.

    Args:
        multiple_samples: to the next multiple of this beyond the longest.
    """

    def __init__(self, num_samples: int | None, multiple_samples: int = 1) -> None:
        self.num_samples = num_samples
        self.multiple_samples = multiple_samples

    def __call__(self, items: Sequence[AudioItem]) -> AudioBatch:
        lengths = [item.num_samples for item in items]
        width = self.num_samples or math.ceil(max(lengths) / self.multiple_samples) * self.multiple_samples
        padded = [functional.pad(torch.atleast_2d(item.audio), (0, width - item.num_samples)) for item in items]
        return AudioBatch(
            audio=torch.stack(padded),
            length_samples=torch.tensor(lengths),
            caption=[item.caption for item in items],
            label=[item.label for item in items],
            id=[item.id for item in items],
        )
