"""What travels through the data layer: one clip, one key, one batch."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class AudioItem:
    """One captioned clip: mono `audio [T]`, float32 in [-1, 1], at its source's sample rate and true length."""

    audio: Tensor
    caption: str
    label: str = ""
    id: str = ""


class AudioSource(Protocol):
    """A map-style collection of clips (files, procedural sounds, a mixture).

    `render` is a function of (index, epoch) alone, so that order, workers and resumption do not matter.
    A source that cannot produce item `index` raises `AudioError` (`foley.data.audio_io`).
    """

    sample_rate_hz: int

    def __len__(self) -> int: ...

    def render(self, index: int, epoch: int) -> AudioItem: ...


@runtime_checkable
class TimedSource(Protocol):
    """A source that knows the durations `[N]` of its clips without reading them."""

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]: ...


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
    """`audio [B, 1, T]` zero-padded at the end; `length_samples [B]` (long) says where the padding starts."""

    audio: Tensor
    length_samples: Tensor
    caption: list[str]
    label: list[str]
    id: list[str]


class LatentBatch(TypedDict):
    """`latent [B, C, L]` zero-padded at the end; `frame_mask [B, L]` is true on real frames."""

    latent: Tensor
    frame_mask: Tensor
    caption: list[str]
    label: list[str]
    id: list[str]
