"""Clips of data sets in the form of the `datasets` library: of the Hugging Face hub, or of a folder.

The library's table is read by row, so that order, devices, workers and resumption are those of any other source; a
stream, which has no rows, has a data module of its own (`foley.data.streaming`). Audio is never decoded by the library,
which wants torchcodec for it: the file of a cell, or its path, is read by `foley.data.audio`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from foley.core.channels import check_downmix
from foley.core.logs import get_logger
from foley.core.seeding import derive_seed
from foley.data.audio import AudioError, fitted, read_channels, read_encoded
from foley.data.datamodule import AudioDataModule
from foley.data.dataset import AudioItem
from foley.data.manifest import known_splits
from foley.data.resumable import ResumableDataModule
from foley.data.streaming import StreamedDataModule

_log = get_logger(__name__)


@dataclass(frozen=True)
class HubColumns:
    """What a data set calls its columns, and how its audio is read.

    Args:
        audio: the column of files; None is the only one of type Audio.
        caption: a text, or a list of texts of which training draws one; None is none.
        id: None is the split and the row's number.
        label: a text, or a number that the data set has a name for; None is none.
        downmix, channels: as `foley.data.audio.read_audio` takes them.
        max_duration_seconds: of longer clips only the beginning is read.
    """

    audio: str | None = None
    caption: str | None = None
    id: str | None = None
    label: str | None = None
    sample_rate_hz: int = 24000
    downmix: str = "mean"
    max_duration_seconds: float | None = 30.0
    channels: int = 1

    def __post_init__(self) -> None:
        check_downmix(self.downmix)

    def of(self, features: Mapping[str, Any], name: str) -> "HubColumns":
        """The same with the audio column found; raises ValueError, which lists what there is, for absent columns."""
        audio = self.audio or _only_audio(features, name)
        asked = {
            "audio_column": audio,
            "caption_column": self.caption,
            "id_column": self.id,
            "label_column": self.label,
        }
        for option, column in asked.items():
            if column is not None and column not in features:
                raise ValueError(f"data.{option}={column}: {name} has no such column, only {', '.join(features)}")
        return HubColumns(**{**vars(self), "audio": audio})

    def item(self, row: Mapping[str, Any], features: Mapping[str, Any], place: str) -> AudioItem:
        """The clip of a row; raises AudioError, which calls it `place`, where it cannot be used."""
        audio = self._read(row[str(self.audio)], place)
        caption, *others = _texts(row[self.caption]) if self.caption else [""]
        label = "" if self.label is None else _label(row[self.label], features[self.label])
        clip_id = place if self.id is None else str(row[self.id])
        return AudioItem(torch.from_numpy(audio), caption, label, clip_id, tuple(others))

    def _read(self, cell: Any, place: str) -> np.ndarray:
        path, content = (cell.get("path"), cell.get("bytes")) if isinstance(cell, Mapping) else (cell, None)
        if content is None and isinstance(cell, bytes):
            path, content = None, cell
        if content is None and "://" in str(path):
            content = _fetched(str(path), place)
        if content is not None:
            samples, rate = read_encoded(content, place, self.max_duration_seconds)
        elif path:
            samples, rate = read_channels(Path(path), self.max_duration_seconds)
        else:
            raise AudioError(place, f"its column {self.audio!r} holds neither a file nor the path of one")
        return fitted(samples, rate, place, self.sample_rate_hz, self.channels, self.downmix)


def _only_audio(features: Mapping[str, Any], name: str) -> str:
    found = [column for column, kind in features.items() if type(kind).__name__ == "Audio"]
    if len(found) != 1:
        what = (
            f"several columns of audio, {', '.join(found)}"
            if found
            else f"no column of audio among {', '.join(features)}"
        )
        raise ValueError(f"{name} has {what}: say which by data.audio_column=")
    return found[0]


def _texts(value: Any) -> list[str]:
    """A caption, or several of one clip; at least one, which may be empty."""
    texts = [value] if isinstance(value, str) or value is None else list(value)
    return [str(text) for text in texts if text is not None] or [""]


def _label(value: Any, kind: Any) -> str:
    if value is None:
        return ""
    return str(kind.int2str(value)) if isinstance(value, int) and hasattr(kind, "int2str") else str(value)


def _fetched(url: str, place: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as stream:
            return bytes(stream.read())
    except (OSError, ValueError, ImportError) as error:
        raise AudioError(place, f"cannot be fetched from {url} ({error})") from error


class HubSource:
    """The rows of one split, as an `AudioSource`: a row by its number, the same in every epoch.

    Args:
        rows: a `datasets.Dataset` whose audio is not decoded.
        columns: with the audio column known.
        name: of the split, by which its clips are called where they have no ids.
    """

    def __init__(self, rows: Any, columns: HubColumns, name: str) -> None:
        self.rows, self.columns, self.name = rows, columns, name
        self.sample_rate_hz, self.audio_channels = columns.sample_rate_hz, columns.channels

    def __len__(self) -> int:
        return len(self.rows)

    def clip_name(self, index: int) -> str:
        """Its id, or the split and the number."""
        column = self.columns.id
        return f"{self.name}/{index}" if column is None else str(self.rows.select_columns([column])[index][column])

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`; raises AudioError where it cannot be used."""
        return self.columns.item(self.rows[index], self.rows.features, f"{self.name}/{index}")


def hub_data_module(
    name: str,
    splits: None = None,
    subset: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    audio_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float = 0.05,
    downmix: str = "mean",
    max_duration_seconds: float | None = 30.0,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    bucket_batches: int | None = None,
    channels: int = 1,
    **options: Any,
) -> ResumableDataModule:
    """An `AudioDataModule` of a data set, or a `StreamedDataModule` of its stream.

    Args:
        name: on the hub, or a folder: of files that the library knows, or one that its `save_to_disk` wrote.
        splits: None; `configs/data/audio.yaml` has it for other sources.
        split: which one is for training, as the library writes it ("train[:1000]", "train+extra"; no slices of a
            stream of the hub's); None takes all, by their names.
        val_fraction: as `foley.data.splits.hold_out` takes it, by a hash of the id; without effect on a stream.
        options: of `AudioDataModule`.

    Raises:
        ModuleNotFoundError: without the extra `datasets`.
        ValueError: for a data set or a column that there is not.
    """
    columns = HubColumns(
        *(audio_column, caption_column, id_column, label_column),
        *(options["sample_rate_hz"], downmix, max_duration_seconds, channels),
    )
    parts = {key: _resolved(rows) for key, rows in _open(name, subset, revision, split, streaming).items()}
    known = columns.of(next(iter(parts.values())).features, name)
    parts = {key: _undecoded(rows, known) for key, rows in parts.items()}
    if streaming:
        _check_stream(name, parts, bucket_batches)
        return StreamedDataModule(parts, known, shuffle_buffer=shuffle_buffer, **options)
    sources = _sources(parts, known, val_fraction, name)
    return AudioDataModule(sources, bucket_batches=bucket_batches, channels=channels, **options)


def _check_stream(name: str, parts: Mapping[str, Any], bucket_batches: int | None) -> None:
    if bucket_batches is not None:
        raise ValueError("data.bucket_batches: nobody knows how long the clips of a stream are; set it to null")
    if "val" not in parts:
        _log.warning("%s has no split for validation, and of a stream none is held out (data.val_fraction)", name)


def _open(name: str, subset: str | None, revision: str | None, split: str | None, streaming: bool) -> dict[str, Any]:
    """Tables or streams under train, val and test."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"data=hf wants {error.name}: pip install 'foley[datasets]'") from error
    _store_files_without_torchcodec(datasets.Audio)
    folder = Path(name).expanduser()
    saved = folder if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")) else None
    try:
        if saved is not None:
            loaded = datasets.load_from_disk(str(saved))
            loaded = _as_asked(loaded, split, streaming)
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.exists() else name, subset, revision=revision, split=split, streaming=streaming
            )
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data.name={name}: the data set cannot be opened ({reason})") from error
    if not isinstance(loaded, Mapping):
        return {"train": loaded}
    return {known: loaded[given] for known, given in known_splits(loaded).items()}


def _store_files_without_torchcodec(audio: Any) -> None:
    """Let the library's Audio keep a file or its path where torchcodec, which it imports even for that, is absent."""
    own = audio.encode_example
    if find_spec("torchcodec") is not None or hasattr(own, "__wrapped__"):
        return

    @wraps(own)
    def encode_example(self: Any, value: Any) -> Any:
        match value:
            case str() | Path():
                return {"bytes": None, "path": str(value)}
            case bytes() | bytearray():
                return {"bytes": bytes(value), "path": None}
            case {"path": path, **rest} if "array" not in rest:
                return {"bytes": rest.get("bytes"), "path": path}
            case _:
                return own(self, value)

    audio.encode_example = encode_example


def _as_asked(loaded: Any, split: str | None, streaming: bool) -> Any:
    """A data set that `save_to_disk` wrote, one split of it or a stream where that is wanted."""
    if split is not None:
        loaded = _split_of(loaded if isinstance(loaded, Mapping) else {"train": loaded}, split)
    if not streaming:
        return loaded
    if isinstance(loaded, Mapping):
        return {key: rows.to_iterable_dataset() for key, rows in loaded.items()}
    return loaded.to_iterable_dataset()


def _split_of(tables: Mapping[str, Any], split: str) -> Any:
    """A split of them by its name, or a slice or sum as the library writes it; raises ValueError where it has none."""
    from datasets import ReadInstruction, concatenate_datasets

    lengths = {name: len(rows) for name, rows in tables.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"it has no split {split!r}: {error}") from error
    return concatenate_datasets([tables[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _resolved(rows: Any) -> Any:
    """A table; or a stream that knows its columns, by its first rows where nothing else says them."""
    return rows if rows.features is not None else rows._resolve_features()


def _undecoded(rows: Any, columns: HubColumns) -> Any:
    """The columns that are used alone, with files in the place of audio."""
    from datasets import Audio

    wanted = [name for name in (columns.audio, columns.caption, columns.id, columns.label) if name is not None]
    rows = rows.select_columns(list(dict.fromkeys(wanted)))
    is_audio = isinstance(rows.features[str(columns.audio)], Audio)
    return rows.cast_column(columns.audio, Audio(decode=False)) if is_audio else rows


def _sources(parts: Mapping[str, Any], columns: HubColumns, val_fraction: float, name: str) -> dict[str, HubSource]:
    sources = {key: HubSource(rows, columns, key) for key, rows in parts.items()}
    return sources if "val" in sources else sources | _held_out(sources["train"], val_fraction, name)


def _held_out(train: HubSource, fraction: float, name: str) -> dict[str, HubSource]:
    """Training and validation, apart by a hash of each clip's id; nothing for validation where the fraction is 0."""
    if not 0 <= fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {fraction}")
    if fraction == 0 or len(train) < 2:
        return {}
    column = train.columns.id
    ids: Sequence[Any] = range(len(train)) if column is None else train.rows[column][:]
    places = np.array([derive_seed("held out", str(each)) for each in ids]) / 2**63
    held = (places < fraction) | (places == places.min() if len(train) * fraction >= 1 else False)
    if not held.any() or held.all():
        return {}
    _log.warning("%s has no split for validation: %d of %d clips are held out", name, held.sum(), len(held))
    parts = {"train": ~held, "val": held}
    return {
        key: HubSource(train.rows.select(np.flatnonzero(chosen)), train.columns, f"train-{key}")
        for key, chosen in parts.items()
    }
