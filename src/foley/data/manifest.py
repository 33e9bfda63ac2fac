"""Captioned clips listed in a table, one a row: refused with the line number where it is wrong.

`preflight` looks at every file of a manifest before a run does, and lists those that cannot be used.

Columns of JSON Lines, CSV or TSV: `path` (or `audio_path`, `file`; relative to the manifest's folder), `caption` (text
or a list; or `captions`); optional `id` (default: the path), `duration_seconds` (or `seconds`), `split`, `label`,
`speaker`, `source`, `license`. `ManifestOptions` knows other names. Other columns are ignored.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from foley.core.logs import get_logger
from foley.data.audio import AudioError, open_audio, read_audio
from foley.data.tables import Row, TableError, captions_in, refuse_lines, table_rows, text_in

_log = get_logger(__name__)

_MAX_LISTED = 20
_PATHS = ("path", "audio_path", "file")
_CAPTIONS = ("caption", "captions")
_HINT = "path_column= and caption_column= take other names"

SPLIT_NAMES = ("train", "val", "test")
_SPLITS = {
    **{name: "train" for name in ("train", "training")},
    **{name: "val" for name in ("val", "valid", "validation", "validate", "dev")},
    **{name: "test" for name in ("test", "testing", "eval", "evaluation")},
}

ManifestError = TableError
"""A manifest that must be mended; the message names the file, the lines and the values."""


@dataclass(frozen=True)
class ManifestOptions:
    """What a manifest calls its columns, and what its paths may be.

    Args:
        path_column: None is `path`, `audio_path` or `file`.
        caption_column: one or several, each with a caption or a list of them; None is `caption` and `captions`.
        id_column: None is `id`, or else the path.
        split_column: None is `split`.
        absolute_paths: paths may lead anywhere; otherwise they stay in the folder of the clips.
    """

    path_column: str | None = None
    caption_column: str | Sequence[str] | None = None
    id_column: str | None = None
    split_column: str | None = None
    absolute_paths: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "ManifestOptions":
        """Those among a command's options.

        >>> ManifestOptions.of({"path_column": "file_name", "steps": 50}).path_column
        'file_name'
        """
        return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Where captions are."""
        named = self.caption_column
        return _CAPTIONS if named is None else (named,) if isinstance(named, str) else tuple(named)

    @property
    def _header(self) -> list[str | tuple[str, ...]]:
        """What a table must have: what was named is meant to be there."""
        captions = [_CAPTIONS] if self.caption_column is None else list(self.caption_columns)
        named = [name for name in (self.id_column, self.split_column) if name]
        return [self.path_column or _PATHS, *captions, *named]

    def rows(self, path: Path) -> Iterator[Row]:
        """The rows of the manifest at `path` under our names of columns; raises ManifestError as `table_rows` does."""
        for line, row in table_rows(path, self._header, hint=_HINT):
            yield line, row if isinstance(row, str) else self.rename(row)

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with `path`, `id`, `split` and `duration_seconds` under these names, whatever it calls them."""
        names = {
            "path": (self.path_column,) if self.path_column else _PATHS,
            "id": (self.id_column or "id",),
            "split": (self.split_column or "split",),
            "duration_seconds": ("duration_seconds", "seconds"),
        }
        found = {name: next((at for at in choices if at in row), choices[0]) for name, choices in names.items()}
        rest = {name: cell for name, cell in row.items() if name not in {*found, *found.values()}}
        return rest | {name: row[choice] for name, choice in found.items() if choice in row}


OUR_COLUMNS = ManifestOptions()
"""Of a manifest that calls its columns as we do."""


@dataclass(frozen=True)
class ManifestEntry:
    """One clip: where it is, what it sounds like, where it comes from."""

    path: Path
    caption: str
    id: str
    duration_seconds: float | None = None
    split: str = ""
    label: str = ""
    speaker: str = ""
    source: str = ""
    license: str = ""
    line: int = 0
    other_captions: tuple[str, ...] = ()


def read_manifest(
    path: Path | str, root: Path | str | None = None, options: ManifestOptions = OUR_COLUMNS
) -> list[ManifestEntry]:
    """The entries of the manifest at `path`; clips lie under `root` (default: the manifest's folder).

    Rows that agree in all but the caption are one clip with several.

    Raises:
        ManifestError: whatever `table_rows` refuses, a missing column, an empty caption, a duplicate id, an unknown
            split, a path that leaves the folder; every wrong line is named (the first 20).
    """
    path = Path(path)
    return build_entries(options.rows(path), path, Path(root) if root else path.parent, options)


def checked_rows(path: Path, options: ManifestOptions = OUR_COLUMNS) -> Iterator[Row]:
    """The rows of a manifest as they are read, under our names of columns, with `id` and a text as `caption`.

    All captions of a row that has several are in `captions`. Raises as `table_rows` does.
    """
    for line, row in options.rows(path):
        try:
            entry = build_entry(line, row, path.parent, options)
        except ValueError as error:
            yield line, str(error)
            continue
        more: dict[str, Any] = {"captions": [entry.caption, *entry.other_captions]} if entry.other_captions else {}
        if entry.duration_seconds is not None:
            more["duration_seconds"] = entry.duration_seconds  # cells of a table are text
        yield line, {**_checked(row), "id": entry.id, "caption": entry.caption, **more}


def build_entries(
    rows: Iterable[Row], manifest: Path, root: Path, options: ManifestOptions = OUR_COLUMNS
) -> list[ManifestEntry]:
    """Check `rows` and make entries of them; raises ManifestError that lists each wrong line."""
    entries: dict[str, ManifestEntry] = {}
    problems: list[str] = []
    for line, row in rows:
        try:
            entry = build_entry(line, row, root, options)
            entries[entry.id] = _joined(entries[entry.id], entry) if entry.id in entries else entry
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        refuse_lines(manifest, problems)
    if not entries:
        raise ManifestError(f"{manifest} lists no clips")
    return list(entries.values())


def _joined(first: ManifestEntry, entry: ManifestEntry) -> ManifestEntry:
    """One clip out of two rows that differ in the caption alone; raises ValueError."""
    known = (first.caption, *first.other_captions)
    alike = replace(entry, caption=first.caption, other_captions=first.other_captions, line=first.line) == first
    if not alike or entry.caption in known:
        raise ValueError(f"duplicate id {entry.id!r}, first used on line {first.line}")
    new = [caption for caption in (entry.caption, *entry.other_captions) if caption not in known]
    return replace(first, other_captions=(*first.other_captions, *new))


def build_entry(
    line: int, row: Mapping[str, Any] | str, root: Path, options: ManifestOptions = OUR_COLUMNS
) -> ManifestEntry:
    """Check one row, or what is wrong with it, and make an entry of it; raises ValueError."""
    row = _checked(row)
    path = _text(row, "path", required=True)
    present = [name for name in options.caption_columns if row.get(name) not in (None, "")]
    caption, *others = captions_in(row, present or options.caption_columns[:1])
    return ManifestEntry(
        path=root / (_usable(path) if options.absolute_paths else check_relative(path)),
        caption=caption,
        id=_text(row, "id", required=options.id_column is not None) or path,
        duration_seconds=_duration(row),
        split=split_name(_text(row, "split", required=options.split_column is not None)),
        line=line,
        other_captions=tuple(others),
        **{name: _text(row, name) for name in ("label", "speaker", "source", "license")},
    )


def split_name(name: str) -> str:
    """train, val or test, whatever it is called; the empty name stays empty; raises ValueError.

    >>> [split_name(name) for name in ("Training", "valid", "dev", "eval")]
    ['train', 'val', 'val', 'test']
    """
    known = _SPLITS.get(name.strip().lower(), name)
    if known and known not in SPLIT_NAMES:
        raise ValueError(f"split {name!r} is none of {', '.join(_SPLITS)}; rename it")
    return known


def known_splits(names: Iterable[str]) -> dict[str, str]:
    """By train, val and test, what each is called among `names`; raises ValueError where one is unknown or two are one.

    >>> known_splits(["train", "valid"])
    {'train': 'train', 'val': 'valid'}
    """
    known: dict[str, str] = {}
    for name in names:
        if (meant := split_name(name)) in known:
            raise ValueError(f"the splits {known[meant]!r} and {name!r} are both {meant!r}: rename one, or join them")
        known[meant] = name
    return known


def of_split(entries: Sequence[ManifestEntry], split: str | None, manifest: Path | str) -> list[ManifestEntry]:
    """The entries of a split, by any of its names; None takes all; raises ValueError where it has none."""
    wanted = None if split is None else split_name(split)
    chosen = [entry for entry in entries if wanted in (None, entry.split)]
    if not chosen:
        raise ValueError(f"{manifest} has no split {split!r}, only {sorted({entry.split for entry in entries})}")
    return chosen


def _checked(row: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(row, str):
        raise ValueError(row)
    return row


def _text(row: Mapping[str, Any], name: str, required: bool = False) -> str:
    if required and name not in row:
        raise ValueError(f"`{name}` must be text and is missing: the row has {list(row)}; {_HINT}")
    if row.get(name) is None and not required:
        return ""
    text = text_in(row.get(name), name)
    if required and not text:
        raise ValueError(f"`{name}` is empty")
    return text


def _duration(row: Mapping[str, Any]) -> float | None:
    value = row.get("duration_seconds")
    if value is None or value == "":  # an empty cell of a table
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"`duration_seconds` must be a positive number, got {str(value)[:40]!r}")
    return seconds


def check_relative(path: str) -> str:
    """`path` where it stays inside its folder on every system; raises ValueError otherwise."""
    parts = {*PurePosixPath(path).parts, *PureWindowsPath(path).parts}
    if path.startswith(("/", "\\")) or PureWindowsPath(path).drive or ".." in parts or "\0" in path:
        raise ValueError(
            f"path {path!r} leaves the manifest's folder; give it relative, without `..`, or set absolute_paths=true"
        )
    return path


def _usable(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"path {path!r} holds a NUL character")
    return path


@dataclass(frozen=True)
class FaultyEntry:
    """A manifest entry that cannot be used, and why."""

    entry: ManifestEntry
    reason: str

    def __str__(self) -> str:
        return f"line {self.entry.line}: {self.reason}" if self.entry.line else self.reason  # a folder has no lines


def preflight(entries: Sequence[ManifestEntry], decode: bool = False) -> list[FaultyEntry]:
    """The faults among `entries`: missing, empty, undecodable and truncated files.

    Args:
        decode: read every sample too, which also finds truncated compressed files, NaN and absurd samples; without it
            only headers are read.
    """
    faults = [FaultyEntry(entry, reason) for entry in entries if (reason := _reason(entry, decode))]
    if faults:
        listed = "\n  ".join(map(str, faults[:_MAX_LISTED]))
        _log.warning(
            "%d of %d clips cannot be used:\n  %s%s",
            len(faults),
            len(entries),
            listed,
            f"\n  and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else "",
        )
    return faults


def _reason(entry: ManifestEntry, decode: bool) -> str:
    try:
        with open_audio(entry.path, entry.duration_seconds) as file:
            rate = file.samplerate
        if decode:
            read_audio(entry.path, rate)
    except AudioError as error:
        return str(error)
    return ""
