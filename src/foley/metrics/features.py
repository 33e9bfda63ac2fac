"""Clips that a metric judges, in memory or on disk, and their features under a protocol.

Features are cached by the content of the audio file and the identity of the protocol: an edited file or another
extractor never meets old features.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from foley.core.channels import lossy_mixes
from foley.core.files import AUDIO_SUFFIXES, write_tensors
from foley.core.logs import get_logger
from foley.core.numbers import SHARE
from foley.core.reading import DamagedFileError, read_json, reading
from foley.core.remote import find_files, hash_of, is_file, local_file
from foley.metrics.latency import RealTimeFactor
from foley.metrics.preprocessing import Preprocessing
from foley.metrics.protocols import EvaluationProtocol

MAX_FAULTY_SHARE = 0.05
"""Of the files of a set that cannot be used; more stop an evaluation, for it would be of another set."""

# Sound that is not decoded: to look away would leave clips out without a word, so these count as faulty ones.
OTHER_SOUND = frozenset({".m4a", ".aac", ".wma", ".mp4", ".webm", ".mka", ".amr", ".ape", ".wv", ".ac3"})
_COMPANIONS = frozenset({".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".html", ".png", ".log", ".yaml"})
_CHUNK_CLIPS = 16
_LOADER_THREADS = 2
_MOST_NAMED = 5

AudioLoader = Callable[[Path], tuple[NDArray[np.float32], int]]
"""Gives samples `[T, channels]` as they are stored, and their rate."""
Row = dict[str, Tensor]
"""What is kept of a clip: `features [F, D]`, `logits [K]`, `peaks []`, `seconds []`."""
_ROW = {"features": 2, "logits": 1, "peaks": 0, "seconds": 0}  # the dimensions of each

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
    """An audio file to be judged; `caption` is the prompt of a generated clip, `rtf` how fast it was made."""

    path: Path
    id: str
    label: str | None = None
    caption: str | None = None
    rtf: RealTimeFactor | None = None


def find_sounds(directory: Path) -> tuple[list[Path], list[Path]]:
    """The sounds below `directory`, those in formats that are not decoded among them, and all else, each in order.

    Hidden files are neither. Raises FileNotFoundError where there is no folder.
    """
    files = sorted(path for path in find_files(directory) if not path.name.startswith("."))
    is_sound = {path: path.suffix.lower() in AUDIO_SUFFIXES | OTHER_SOUND for path in files}
    return [path for path in files if is_sound[path]], [path for path in files if not is_sound[path]]


def scan_directory(directory: Path) -> list[ClipFile]:
    """Every audio file below `directory` in the order of its path, with `id`, `label` and `prompt` of its sidecar JSON.

    Without a sidecar's `id` the file's stem is the id. Hidden files are none of the set; other files that are left out
    are counted and named.

    Raises FileNotFoundError where there is no folder, or no audio in it, and ValueError for a sidecar that is none.
    """
    paths, rest = find_sounds(directory)
    if not paths:
        suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
        raise FileNotFoundError(f"{directory} holds no audio file ({suffixes}); check the path")
    others = [path for path in rest if path.suffix.lower() not in _COMPANIONS]
    if others:
        kinds = ", ".join(f"{n} {suffix or 'without an ending'}" for suffix, n in _count_suffixes(others).items())
        _log.warning("%s: %d files are left out (%s), such as %s", directory, len(others), kinds, others[0].name)
    return [_read_clip(path) for path in paths]


def _count_suffixes(paths: Iterable[Path]) -> Counter[str]:
    return Counter(path.suffix.lower() for path in paths)


def _read_clip(path: Path) -> ClipFile:
    sidecar = path.with_suffix(".json")
    if not is_file(sidecar):
        return ClipFile(path, path.stem)
    fields = read_json(local_file(sidecar), "the sidecar of a clip", "repair or remove it")
    if not isinstance(fields, dict):
        raise DamagedFileError(f"{sidecar} is not the sidecar of a clip: it holds no object; repair or remove it")
    id, label, prompt = (_text(fields, name, sidecar) for name in ("id", "label", "prompt"))
    if id == "":
        raise DamagedFileError(f"{sidecar}: `id` is empty; give one, or leave it out for the file's name")
    return ClipFile(path, path.stem if id is None else id, label, prompt, RealTimeFactor.of_json(fields))


def _text(fields: Mapping[str, Any], name: str, sidecar: Path) -> str | None:
    """Text, or a whole number as text; null is nothing."""
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or isinstance(value, str):
        return value
    raise DamagedFileError(f"{sidecar}: `{name}` must be text, got {value!r}; mend it, or leave it out")


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
    `logits [N, K]`, absolute `peaks [N]` and `seconds [N]` of the audio that was judged, and ids, labels and captions.
    Clips of equal `recordings` are one recording under several captions. `faulty` maps the id of each clip that could
    not be used, and is not among the N, to the reason.
    """

    ids: list[str]
    labels: list[str | None]
    captions: list[str | None]
    features: Tensor
    windows: Tensor
    logits: Tensor
    peaks: Tensor
    recordings: list[str]
    seconds: Tensor
    faulty: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, sets: Sequence["ClipFeatures"]) -> "ClipFeatures":
        """All clips of several sets, which keep their ids."""
        columns: dict[str, Any] = {field.name: [getattr(clips, field.name) for clips in sets] for field in fields(cls)}
        faulty = {id: reason for part in columns.pop("faulty") for id, reason in part.items()}
        for name, parts in columns.items():
            whole = isinstance(parts[0], Tensor)
            columns[name] = torch.cat(parts) if whole else [row for part in parts for row in part]
        return cls(**columns, faulty=faulty)

    def distinct(self) -> tuple["ClipFeatures", list[int]]:
        """Every recording once, under its first caption, and the place there of each clip `[N]`."""
        first: dict[str, int] = {}
        for row, recording in enumerate(self.recordings):
            first.setdefault(recording, row)
        place = {recording: number for number, recording in enumerate(first)}
        return self.rows(list(first.values())), [place[recording] for recording in self.recordings]

    def rows(self, rows: Sequence[int]) -> "ClipFeatures":
        """Some of the clips."""
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
            seconds=self.seconds[rows],
            faulty=self.faulty,
        )


class _Input(NamedTuple):
    """An extractor's input for one clip, and the peak and length of the audio it came from."""

    audio: Tensor
    peak: Tensor
    seconds: Tensor


def _pack(
    items: Iterable[Row],
    ids: Sequence[str],
    labels: Sequence[str | None],
    captions: Sequence[str | None],
    recordings: Iterable[object],
    faulty: Mapping[str, str] | None = None,
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
        seconds=torch.stack([row["seconds"] for row in rows]),
        faulty=faulty or {},
    )


def _prepare(audio: Tensor, rate_hz: int, name: str, protocol: EvaluationProtocol) -> _Input:
    if audio.numel() == 0 or not bool(audio.isfinite().all()):
        raise ValueError(f"{name}: audio is empty or not finite ({audio.numel()} samples); regenerate the clip")
    audio = protocol.crop(audio, rate_hz)
    if len(audio) > 1 and protocol.preprocessing.channel_rule == Preprocessing.channel_rule:
        lossy_mixes.note(name, audio.T.numpy())
    seconds = torch.tensor(audio.shape[-1] / rate_hz)
    return _Input(protocol.preprocessing(audio.float(), rate_hz), audio.abs().max().float(), seconds)


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
            features, item = output.features[row].view(-1, output.features.shape[-1]), inputs[index]
            rows[index] = {
                "features": features,
                "logits": output.logits[row],
                "peaks": item.peak,
                "seconds": item.seconds,
            }
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
    """One safetensors file per clip under `directory / protocol identity`, named by the SHA-256 of the audio file.

    In subfolders by the first two digits of it; earlier versions wrote all into one, where they are still found.
    """

    def __init__(self, directory: Path | None, protocol: EvaluationProtocol) -> None:
        self._directory = None if directory is None else directory / f"{protocol.name}-{protocol.identity[:16]}"
        self._width = protocol.extractor.feature_dim

    def load(self, content_hash: str) -> Row | None:
        """The row of the audio with this content, or None; an unreadable file is reported and made anew."""
        for path in filter(Path.is_file, self._paths(content_hash)):
            try:
                with reading(path, "features of a clip"):
                    return self._checked(load_file(path))
            except DamagedFileError as error:
                _log.warning("%s cannot be read (%s); extracting its features again", path, error)
        return None

    def save(self, content_hash: str, row: Row) -> None:
        """Keep `row` for the audio with this content."""
        for path in self._paths(content_hash)[:1]:
            write_tensors(path, row)

    def _checked(self, row: Row) -> Row:
        shapes = {name: row[name].ndim for name in _ROW}
        if shapes != _ROW or row["features"].shape[1] != self._width:
            raise ValueError(f"its tensors have other shapes: { ({name: list(row[name].shape) for name in _ROW}) }")
        return row

    def _paths(self, content_hash: str) -> list[Path]:
        """Where it is kept, and where it may lie; none without a directory."""
        if self._directory is None:
            return []
        folders = self._directory / content_hash[:2], self._directory
        return [folder / f"{content_hash}.safetensors" for folder in folders]


class FaultyClipsError(ValueError):
    """More files of a set cannot be used than the evaluation allows."""


def extract_files(
    clips: Sequence[ClipFile],
    protocol: EvaluationProtocol,
    load: AudioLoader,
    cache_directory: Path | None = None,
    max_faulty_share: float = MAX_FAULTY_SHARE,
) -> ClipFeatures:
    """Features of audio files, of which a few are in memory at a time. Unchanged files come from the cache.

    Files that cannot be used are left out, counted and named; raises FaultyClipsError where there are more of them
    than `max_faulty_share` of all, and ValueError for a share that is none.
    """
    SHARE.check("max_faulty_share", max_faulty_share)
    hashes, rows, reasons = _extracted(clips, protocol, load, cache_directory)
    faulty = {clip.id: reasons[key] for clip, key in zip(clips, hashes, strict=True) if key in reasons}
    _check_faulty(faulty, len(clips), max_faulty_share)
    kept = [(clip, rows[key]) for clip, key in zip(clips, hashes, strict=True) if key in rows]
    return _pack(
        (row for _, row in kept),
        [clip.id for clip, _ in kept],
        [clip.label for clip, _ in kept],
        [clip.caption for clip, _ in kept],
        (clip.path for clip, _ in kept),
        faulty,
    )


def keep_features(
    clips: Sequence[ClipFile], protocol: EvaluationProtocol, load: AudioLoader, cache_directory: Path
) -> None:
    """Put the features of audio files that lack them into the cache; whoever takes them from it counts faults."""
    _extracted(clips, protocol, load, cache_directory)


def _extracted(
    clips: Sequence[ClipFile], protocol: EvaluationProtocol, load: AudioLoader, cache_directory: Path | None
) -> tuple[list[str], dict[str, Row], dict[str, str]]:
    """The hash of each file, and by it the row, or why there is none."""
    cache = FeatureCache(cache_directory, protocol)
    hashes = [hash_of(clip.path) for clip in clips]
    rows = {key: row for key in set(hashes) if (row := cache.load(key)) is not None}
    missing = {key: clip.path for key, clip in zip(hashes, clips, strict=True) if key not in rows}
    first = f" ({clips[0].path}, ...)" if clips else ""  # tells samples and reference apart
    _log.info("features of %d clips%s: %d files cached, %d to extract", len(clips), first, len(rows), len(missing))
    absent = list(missing.items())
    chunks = [absent[start : start + _CHUNK_CLIPS] for start in range(0, len(absent), _CHUNK_CLIPS)]
    reasons: dict[str, str] = {}
    prepare = partial(_prepare_file, load=load, protocol=protocol)
    saving: list[Future[None]] = []
    with ThreadPoolExecutor(_LOADER_THREADS) as pool:
        for chunk in track(chunks, description="extracting features", disable=not chunks):
            prepared = dict(zip(dict(chunk), pool.map(prepare, dict(chunk).values()), strict=True))
            reasons |= {key: item for key, item in prepared.items() if isinstance(item, str)}
            usable = {key: item for key, item in prepared.items() if not isinstance(item, str)}
            for key, row in zip(usable, _extract(list(usable.values()), protocol), strict=True):
                rows[key] = {name: value.clone() for name, value in row.items()}  # not the batch behind it
                saving.append(pool.submit(cache.save, key, rows[key]))  # a disk takes its time, while others compute
            while len(saving) > _CHUNK_CLIPS:
                saving.pop(0).result()
    for saved in saving:
        saved.result()
    lossy_mixes.report()
    return hashes, rows, reasons


def _prepare_file(path: Path, load: AudioLoader, protocol: EvaluationProtocol) -> _Input | str:
    """The input of a file, or why it has none."""
    try:
        samples, rate_hz = load(path)
        return _prepare(torch.from_numpy(samples).T, rate_hz, str(path), protocol)
    except (RuntimeError, ValueError, OSError) as error:  # whatever a loader says of a file that is no use
        return str(error)


def _check_faulty(faulty: Mapping[str, str], count: int, max_share: float) -> None:
    if not faulty:
        return
    more = f", and {len(faulty) - _MOST_NAMED} more" if len(faulty) > _MOST_NAMED else ""
    named = "; ".join(f"{id} ({reason})" for id, reason in list(faulty.items())[:_MOST_NAMED])
    message = f"{len(faulty)} of {count} clips cannot be used: {named}{more}"
    if len(faulty) > max_share * count:
        raise FaultyClipsError(f"{message}; mend or remove them, or let more pass with max_faulty_share= ({max_share})")
    _log.warning("%s; they are left out", message)
