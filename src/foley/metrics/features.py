"""Features of clips under a protocol, cached by the content of the audio file and the identity of the protocol."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foley.checkpoint import write_tensors
from foley.hashing import hash_file
from foley.logs import get_logger
from foley.metrics.clips import ClipFile, LabelledAudio
from foley.metrics.protocols import EvaluationProtocol

log = get_logger(__name__)

_CHUNK_CLIPS = 16
_LOADER_THREADS = 2

AudioLoader = Callable[[Path], Tensor | NDArray[np.float32]]


@dataclass(frozen=True)
class ClipFeatures:
    """`features [N, D]`, `logits [N, K]` and absolute `peaks [N]` of N clips with their ids and labels."""

    ids: list[str]
    labels: list[str | None]
    features: Tensor
    logits: Tensor
    peaks: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def with_labels(self, labels: Sequence[str | None]) -> "ClipFeatures":
        """The same features under other labels."""
        return replace(self, labels=list(labels))


def _pack(items: Iterable[dict[str, Tensor]], ids: Sequence[str], labels: Sequence[str | None]) -> ClipFeatures:
    rows = list(items)
    if not rows:
        raise ValueError("there are no clips to extract features from; give at least one")
    return ClipFeatures(list(ids), list(labels), **{k: torch.stack([row[k] for row in rows]) for k in rows[0]})


def _extract(audio: Sequence[Tensor], names: Sequence[str], protocol: EvaluationProtocol) -> list[dict[str, Tensor]]:
    """Rows of features for clips of any lengths; equal padded lengths run as one batch."""
    peaks = []
    by_length: dict[int, list[int]] = {}
    padded = []
    for index, (clip, name) in enumerate(zip(audio, names, strict=True)):
        flat = clip.reshape(-1).float()
        if flat.numel() == 0 or not bool(flat.isfinite().all()):
            raise ValueError(f"{name}: audio is empty or not finite ({flat.numel()} samples); regenerate the clip")
        peaks.append(flat.abs().max())
        padded.append(protocol.pad(flat))
        by_length.setdefault(padded[-1].numel(), []).append(index)
    rows: list[dict[str, Tensor]] = [{} for _ in audio]
    for indices in by_length.values():
        with torch.inference_mode():
            output = protocol.extractor(torch.stack([padded[index] for index in indices]))
        for row, index in enumerate(indices):
            rows[index] = {"features": output.features[row], "logits": output.logits[row], "peaks": peaks[index]}
    return rows


def extract_audio(clips: Sequence[LabelledAudio], protocol: EvaluationProtocol) -> ClipFeatures:
    """Features of clips in memory; clips without an id are called by their position."""
    ids = [clip.id if clip.id is not None else str(index) for index, clip in enumerate(clips)]
    rows: list[dict[str, Tensor]] = []
    for start in range(0, len(clips), _CHUNK_CLIPS):
        part = slice(start, start + _CHUNK_CLIPS)
        rows += _extract([clip.audio for clip in clips[part]], ids[part], protocol)
    return _pack(rows, ids, [clip.label for clip in clips])


class FeatureCache:
    """One safetensors file per clip under `directory / protocol identity`, named by the SHA-256 of the audio file."""

    def __init__(self, directory: Path | None, protocol: EvaluationProtocol) -> None:
        self._directory = None if directory is None else directory / f"{protocol.name}-{protocol.identity[:16]}"

    def load(self, content_hash: str) -> dict[str, Tensor] | None:
        """The row of the audio with this content, or None; an unreadable file is reported and made anew."""
        path = self._path(content_hash)
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            log.warning("%s cannot be read (%s); extracting its features again", path, error)
            return None

    def save(self, content_hash: str, row: dict[str, Tensor]) -> None:
        """Keep `row` for the audio with this content."""
        path = self._path(content_hash)
        if path is not None:
            write_tensors(path, {key: value.clone() for key, value in row.items()})

    def _path(self, content_hash: str) -> Path | None:
        return None if self._directory is None else self._directory / f"{content_hash}.safetensors"


def extract_files(
    clips: Sequence[ClipFile], protocol: EvaluationProtocol, load: AudioLoader, cache_directory: Path | None = None
) -> ClipFeatures:
    """Features of audio files; `load` gives mono audio at the protocol's rate. Unchanged files come from the cache."""
    cache = FeatureCache(cache_directory, protocol)
    hashes = [hash_file(clip.path) for clip in clips]
    rows = {key: row for key in set(hashes) if (row := cache.load(key)) is not None}
    missing = {key: clip.path for key, clip in zip(hashes, clips, strict=True) if key not in rows}
    log.info("features of %d clips: %d cached, %d to extract", len(clips), len(clips) - len(missing), len(missing))
    chunks = [list(missing.items())[start : start + _CHUNK_CLIPS] for start in range(0, len(missing), _CHUNK_CLIPS)]
    with ThreadPoolExecutor(_LOADER_THREADS) as pool:
        for chunk in track(chunks, description="extracting features", disable=not chunks):
            audio = [torch.as_tensor(samples) for samples in pool.map(load, [path for _, path in chunk])]
            extracted = _extract(audio, [str(path) for _, path in chunk], protocol)
            for (key, _), row in zip(chunk, extracted, strict=True):
                cache.save(key, row)
                rows[key] = row
    return _pack((rows[key] for key in hashes), [clip.id for clip in clips], [clip.label for clip in clips])
