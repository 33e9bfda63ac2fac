"""Clips to a latent cache: encode every clip once, so that diffusion training never runs the codec."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from foley.data.audio_io import AudioError
from foley.data.dataset import AudioDataset, DataFaultError
from foley.data.latent_writer import LatentCacheWriter, latent_cache_writer
from foley.data.types import AudioItem, SampleKey
from foley.hashing import hash_module
from foley.logs import get_logger

_log = get_logger(__name__)
_MAX_WAITING = 512


class Posterior(Protocol):
    """A diagonal Gaussian over latents: mean and standard deviation, each `[B, C, L]`."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...


class Encoder(Protocol):
    """The part of a codec that encoding needs; it is an `nn.Module` too, so that it can be hashed."""

    sample_rate_hz: int
    hop_samples: int

    def posterior(self, audio: Tensor) -> Posterior:
        """Of the latents of `audio` `[B, 1, T]`."""
        ...


def encode_latents(
    codec: Encoder,
    datasets: Mapping[str, AudioDataset],
    output_dir: Path,
    batch_size: int = 16,
    min_duration_seconds: float = 0.0,
    device: str | torch.device = "cpu",
) -> None:
    """Write a latent cache of all clips in `datasets` (by split) to `output_dir`, all of it or nothing.

    Args:
        min_duration_seconds: shorter clips get silence at their end before they are encoded; silence is content.

    Raises:
        ValueError: the clips' sample rate is not the codec's.
        DataFaultError: too many clips cannot be used; fewer are left out and counted.
    """
    if not isinstance(codec, nn.Module):
        raise TypeError(f"the codec must be an nn.Module, got {type(codec).__name__}")
    codec.to(device).eval()
    min_samples = round(min_duration_seconds * codec.sample_rate_hz)
    output = latent_cache_writer(output_dir, hash_module(codec), codec.sample_rate_hz, codec.hop_samples)
    with output as writer, _progress() as progress:
        for split, dataset in datasets.items():
            if dataset.source.sample_rate_hz != codec.sample_rate_hz:
                raise ValueError(
                    f"split {split!r} is at {dataset.source.sample_rate_hz} Hz and the codec at "
                    f"{codec.sample_rate_hz} Hz; set the data's sample_rate_hz to the codec's"
                )
            task = progress.add_task(split, total=len(dataset), rate="")
            for batch in _equal_length_batches(_usable_items(dataset), codec.hop_samples, min_samples, batch_size):
                _encode_batch(codec, batch, split, min_samples, writer, device)
                _advance(progress, task, len(batch))


def _progress() -> Progress:
    columns = TextColumn("encode {task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn())


def _advance(progress: Progress, task_id: int, clips: int) -> None:
    task = progress.tasks[task_id]
    rate = f"{task.finished_speed or task.speed or 0.0:.1f} clips/s"
    progress.update(task.id, advance=clips, rate=rate)


def _usable_items(dataset: AudioDataset) -> Iterator[AudioItem]:
    faults = 0
    for index in range(len(dataset)):
        try:
            yield dataset.load(SampleKey(index, 0))
        except AudioError as error:
            faults += 1
            _log.warning("leaving out clip %d (%d so far): %s", index, faults, error)
            if faults > max(1.0, dataset.max_fault_fraction * len(dataset)):
                raise DataFaultError(f"{faults} of {len(dataset)} clips cannot be used. The last: {error}") from error


def _equal_length_batches(
    items: Iterator[AudioItem], hop_samples: int, min_samples: int, batch_size: int
) -> Iterator[list[AudioItem]]:
    """Batches of clips with the same number of frames, so that no clip's latent depends on its neighbours' lengths."""
    waiting: dict[int, list[AudioItem]] = {}
    for item in items:
        frames = math.ceil(max(len(item.audio), min_samples) / hop_samples)
        waiting.setdefault(frames, []).append(item)
        if len(waiting[frames]) == batch_size:
            yield waiting.pop(frames)
        elif sum(map(len, waiting.values())) >= _MAX_WAITING:
            yield waiting.pop(max(waiting, key=lambda length: len(waiting[length])))
    yield from waiting.values()


@torch.no_grad()
def _encode_batch(
    codec: Encoder,
    items: list[AudioItem],
    split: str,
    min_samples: int,
    writer: LatentCacheWriter,
    device: str | torch.device,
) -> None:
    hop = codec.hop_samples
    width = math.ceil(max(len(items[0].audio), min_samples) / hop) * hop
    audio = torch.stack([functional.pad(item.audio, (0, width - len(item.audio))) for item in items])[:, None]
    posterior = codec.posterior(audio.to(device))
    for item, mean, std in zip(items, posterior.mean, posterior.std, strict=True):
        seconds = len(item.audio) / codec.sample_rate_hz
        writer.add(mean, std, item.id, item.caption, item.label, split, seconds)
