"""Features of clips under a protocol, cached by the content of the audio file and the identity of the protocol."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foley.files import write_tensors
from foley.hashing import hash_file
from foley.logs import get_logger
from foley.metrics.clips import ClipFile, LabelledAudio
from foley.metrics.protocols import EvaluationProtocol

log = get_logger(__name__)

_CHUNK_CLIPS = 16
_LOADER_THREADS = 2

AudioLoader = Callable[[Path], tuple[NDArray[np.float32], int]]
"""Gives samples `[T, channels]` as they are stored, and their rate."""
Row = dict[str, Tensor]
"""What is kept of a clip: `features [F, D]`, `logits [K]`, `peaks []`."""


@dataclass(frozen=True)
class ClipFeatures:
    """What an extractor says of N clips.

    `features [M, D]`: one row for each clip, or as many as `windows [N]` says for extractors that go by windows;
    `logits [N, K]`, absolute `peaks [N]` of the stored audio, and ids, labels and captions. Clips of equal `recordings`
    are one recording under several captions.
    """

    ids: list[str]
    labels: list[str | None]
    captions: list[str | None]
    features: Tensor
    windows: Tensor
    logits: Tensor
    peaks: Tensor
    recordings: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def with_labels(self, labels: Sequence[str | None]) -> "ClipFeatures":
        """The same features under other labels."""
        return replace(self, labels=list(labels))

    def distinct(self) -> tuple["ClipFeatures", list[int]]:
        """Every recording once, under its first caption, and the place there of each clip `[N]`."""
        first: dict[str, int] = {}
        for row, recording in enumerate(self.recordings):
            first.setdefault(recording, row)
        place = {recording: number for number, recording in enumerate(first)}
        return self._rows(list(first.values())), [place[recording] for recording in self.recordings]

    def _rows(self, rows: Sequence[int]) -> "ClipFeatures":
        parts = self.features.split(self.windows.tolist())
        return ClipFeatures(
            [self.ids[row] for row in rows],
            [self.labels[row] for row in rows],
            [self.captions[row] for row in rows],
            features=torch.cat([parts[row] for row in rows]),
            windows=self.windows[rows],
            logits=self.logits[rows],
            peaks=self.peaks[rows],
            recordings=[self.recordings[row] for row in rows],
        )


class _Input(NamedTuple):
    """An extractor's input for one clip, and the peak of the audio it came from."""

    audio: Tensor
    peak: Tensor


def _pack(
    items: Iterable[Row],
    ids: Sequence[str],
    labels: Sequence[str | None],
    captions: Sequence[str | None],
    recordings: Iterable[object],
) -> ClipFeatures:
    rows = list(items)
    if not rows:
        raise ValueError("there are no clips to extract features from; give at least one")
    return ClipFeatures(
        list(ids),
        list(labels),
        list(captions),
        features=torch.cat([row["features"] for row in rows]),
        windows=torch.tensor([len(row["features"]) for row in rows]),
        logits=torch.stack([row["logits"] for row in rows]),
        peaks=torch.stack([row["peaks"] for row in rows]),
        recordings=list(map(str, recordings)),
    )


def _prepare(audio: Tensor, rate_hz: int, name: str, protocol: EvaluationProtocol) -> _Input:
    if audio.numel() == 0 or not bool(audio.isfinite().all()):
        raise ValueError(f"{name}: audio is empty or not finite ({audio.numel()} samples); regenerate the clip")
    return _Input(protocol.preprocessing(audio.float(), rate_hz), audio.abs().max().float())


def _extract(inputs: Sequence[_Input], protocol: EvaluationProtocol) -> list[Row]:
    """Rows of features for clips of any lengths; inputs of equal shape run as one batch."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, item in enumerate(inputs):
        by_shape.setdefault(item.audio.shape, []).append(index)
    rows: list[Row] = [{} for _ in inputs]
    for indices in by_shape.values():
        with torch.inference_mode():
            output = protocol.extractor(torch.stack([inputs[index].audio for index in indices]))
        for row, index in enumerate(indices):
            features = output.features[row].view(-1, output.features.shape[-1])
            rows[index] = {"features": features, "logits": output.logits[row], "peaks": inputs[index].peak}
    return rows


def extract_audio(
    clips: Sequence[LabelledAudio], protocol: EvaluationProtocol, sample_rate_hz: int | None = None
) -> ClipFeatures:
    """Features of clips in memory; clips without an id are called by their position.

    Args:
        sample_rate_hz: of the clips; None: the protocol's.
    """
    ids = [clip.id if clip.id is not None else str(index) for index, clip in enumerate(clips)]
    rows: list[Row] = []
    for start in range(0, len(clips), _CHUNK_CLIPS):
        part = slice(start, start + _CHUNK_CLIPS)
        inputs = [
            _prepare(torch.atleast_2d(clip.audio), sample_rate_hz or protocol.sample_rate_hz, name, protocol)
            for clip, name in zip(clips[part], ids[part], strict=True)
        ]
        rows += _extract(inputs, protocol)
    return _pack(rows, ids, [clip.label for clip in clips], [clip.caption for clip in clips], range(len(clips)))


class FeatureCache:
    """One safetensors file per clip under `directory / protocol identity`, named by the SHA-256 of the audio file."""

    def __init__(self, directory: Path | None, protocol: EvaluationProtocol) -> None:
        self._directory = None if directory is None else directory / f"{protocol.name}-{protocol.identity[:16]}"

    def load(self, content_hash: str) -> Row | None:
        """The row of the audio with this content, or None; an unreadable file is reported and made anew."""
        path = self._path(content_hash)
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            log.warning("%s cannot be read (%s); extracting its features again", path, error)
            return None

    def save(self, content_hash: str, row: Row) -> None:
        """Keep `row` for the audio with this content."""
        path = self._path(content_hash)
        if path is not None:
            write_tensors(path, row)

    def _path(self, content_hash: str) -> Path | None:
        return None if self._directory is None else self._directory / f"{content_hash}.safetensors"


def extract_files(
    clips: Sequence[ClipFile], protocol: EvaluationProtocol, load: AudioLoader, cache_directory: Path | None = None
) -> ClipFeatures:
    """Features of audio files, of which a few are in memory at a time. Unchanged files come from the cache."""
    cache = FeatureCache(cache_directory, protocol)
    hashes = [hash_file(clip.path) for clip in clips]
    rows = {key: row for key in set(hashes) if (row := cache.load(key)) is not None}
    missing = {key: clip.path for key, clip in zip(hashes, clips, strict=True) if key not in rows}
    log.info("features of %d clips: %d files cached, %d to extract", len(clips), len(rows), len(missing))
    chunks = [list(missing.items())[start : start + _CHUNK_CLIPS] for start in range(0, len(missing), _CHUNK_CLIPS)]

    def prepare(path: Path) -> _Input:
        samples, rate_hz = load(path)
        return _prepare(torch.from_numpy(samples).T, rate_hz, str(path), protocol)

    with ThreadPoolExecutor(_LOADER_THREADS) as pool:
        for chunk in track(chunks, description="extracting features", disable=not chunks):
            extracted = _extract(list(pool.map(prepare, [path for _, path in chunk])), protocol)
            for (key, _), row in zip(chunk, extracted, strict=True):
                rows[key] = {name: value.clone() for name, value in row.items()}  # not the batch behind it
                cache.save(key, rows[key])
    return _pack(
        (rows[key] for key in hashes),
        [clip.id for clip in clips],
        [clip.label for clip in clips],
        [clip.caption for clip in clips],
        (clip.path for clip in clips),
    )
