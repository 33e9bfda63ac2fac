"""Clips that a metric judges, in memory or on disk, and their features under a protocol.

Features are cached by the content of the audio file and the identity of the protocol: an edited file or another
extractor never meets old features.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from foley.core.channels import lossy_mixes
from foley.core.files import AUDIO_SUFFIXES, write_tensors
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.metrics.preprocessing import Preprocessing
from foley.metrics.protocols import EvaluationProtocol

_CHUNK_CLIPS = 16
_LOADER_THREADS = 2

AudioLoader = Callable[[Path], tuple[NDArray[np.float32], int]]
"""Gives samples `[T, channels]` as they are stored, and their rate."""
Row = dict[str, Tensor]
"""What is kept of a clip: `features [F, D]`, `logits [K]`, `peaks []`."""

_log = get_logger(__name__)


# Clips and their labels.


class LabelledAudio(NamedTuple):
    """`audio [T]` or `[channels, T]` at the protocol's rate; equal `id`s are a pair; `caption` is the prompt."""

    audio: Tensor
    label: str | None = None
    id: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class ClipFile:
    """An audio file to be judged; `caption` is the prompt of a generated clip."""

    path: Path
    id: str
    label: str | None = None
    caption: str | None = None


def scan_directory(directory: Path) -> list[ClipFile]:
    """Every audio file below `directory` in the order of its path, with `id`, `label` and `prompt` of its sidecar JSON.

    Without a sidecar's `id` the file's stem is the id. Raises FileNotFoundError where there is no audio.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
        raise FileNotFoundError(f"{directory} holds no audio file ({suffixes}); check the path")
    return [_read_clip(path) for path in paths]


def _read_clip(path: Path) -> ClipFile:
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return ClipFile(path, path.stem)
    try:
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{sidecar} is not JSON ({error}); repair or remove this sidecar") from error
    return ClipFile(path, str(fields.get("id", path.stem)), fields.get("label"), fields.get("prompt"))


def label_from_text(text: str, labels: Iterable[str]) -> str | None:
    """The one label that `text` names as whole words (`_` reads as a space); None where no label or several are named.

    A label inside a longer one that is also named does not count: "car alarm" names `car_alarm`, not `alarm`.
    """
    words = {label: label.replace("_", " ").lower() for label in labels}
    text = text.lower().replace("_", " ")
    named = [label for label, spelled in words.items() if re.search(rf"\b{re.escape(spelled)}\b", text)]
    longest = [a for a in named if not any(a != b and words[a] in words[b] for b in named)]
    return longest[0] if len(longest) == 1 else None


def resolve_labels(
    clips: Sequence[ClipFile], captions: Mapping[str, str], named_labels: Sequence[str]
) -> list[str | None]:
    """A label per clip: its own; else that of its prompt in `captions`; else the one named in its prompt."""
    resolved = []
    for clip in clips:
        prompt = clip.caption or ""
        resolved.append(clip.label or captions.get(prompt) or label_from_text(prompt, named_labels))
    return resolved


def labels_by_caption(pairs: Iterable[tuple[str | None, str | None]]) -> dict[str, str]:
    """Caption to label from pairs of both, without captions that stand for several labels."""
    found: dict[str, set[str]] = {}
    for caption, label in pairs:
        if caption and label:
            found.setdefault(caption, set()).add(label)
    return {caption: next(iter(labels)) for caption, labels in found.items() if len(labels) == 1}


# Their features.


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
    if len(audio) > 1 and protocol.preprocessing.channel_rule == Preprocessing.channel_rule:
        lossy_mixes.note(name, audio.T.numpy())
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
            _log.warning("%s cannot be read (%s); extracting its features again", path, error)
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
    _log.info("features of %d clips: %d files cached, %d to extract", len(clips), len(rows), len(missing))
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
    lossy_mixes.report()
    return _pack(
        (rows[key] for key in hashes),
        [clip.id for clip in clips],
        [clip.label for clip in clips],
        [clip.caption for clip in clips],
        (clip.path for clip in clips),
    )
