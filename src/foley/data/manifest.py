"""Captioned clips listed in a table, one a row: refused with the line number where it is wrong.

Columns of JSON Lines, CSV or TSV: `path` (or `audio_path`, `file`; relative to the manifest's folder), `caption` (text
or a list; or `captions`); optional `id` (default: the path), `duration_seconds` (or `seconds`), `split`, `label`,
`speaker`, `source`, `license`. `ManifestOptions` knows other names. Other columns are ignored.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import methodcaller
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from foley.core.remote import local_file
from foley.data.entries import Entries, Fields, ManifestEntry, chunked, joined_columns, transposed
from foley.data.remembered import file_key, memory_file, remembered_columns
from foley.data.tables import Row, TableError, captions_in, refuse_lines, split_name, table_rows, text_in

_PATHS = ("path", "audio_path", "file")
_CAPTIONS = ("caption", "captions")
_HINT = "path_column= and caption_column= take other names"
_SHARED = ("path", "id", "duration_seconds", "split", "label", "speaker", "source", "license")  # by rows of one clip
_WORTH_REMEMBERING_BYTES = 1 << 20  # a smaller manifest is parsed in no time
_PLAIN_PATH = re.compile(r"[^/\\:\0][^\\:\0]*")  # nothing in it could lead out of a folder but `..`

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
        renamed = lru_cache(maxsize=64)(self._renamed)  # all rows of a table have the same names, or nearly
        for line, row in table_rows(path, self._header, hint=_HINT):
            if not isinstance(row, str) and (names := renamed(*row)):
                row = {name: row[at] for name, at in names}
            yield line, row

    def _renamed(self, *given: str) -> list[tuple[str, str]] | None:
        """Our names of a row's columns, each with what is its name among `given`; None where all of them are ours."""
        names = {
            "path": (self.path_column,) if self.path_column else _PATHS,
            "id": (self.id_column or "id",),
            "split": (self.split_column or "split",),
            "duration_seconds": ("duration_seconds", "seconds"),
        }
        found = {name: next((at for at in choices if at in given), choices[0]) for name, choices in names.items()}
        if all(name == at for name, at in found.items()):
            return None
        rest = [(name, name) for name in given if name not in {*found, *found.values()}]
        return [*rest, *((name, at) for name, at in found.items() if at in given)]


OUR_COLUMNS = ManifestOptions()
"""Of a manifest that calls its columns as we do."""


def read_manifest(path: Path | str, root: Path | str | None = None, options: ManifestOptions = OUR_COLUMNS) -> Entries:
    """The entries of the manifest at `path`; clips lie under `root` (default: the manifest's folder).

    Rows that agree in all but the caption are one clip with several. A large manifest is parsed by the first process
    that reads it, while others wait; from then on its columns are mapped from the user's cache folder.

    Raises:
        ManifestError: whatever `table_rows` refuses, a missing column, an empty caption, a duplicate id, an unknown
            split, a path that leaves the folder; every wrong line is named (the first 20).
    """
    root, path = Path(root) if root else Path(path).parent, local_file(path)

    def parse() -> Entries:
        return build_entries(options.rows(path), path, root, options)

    if not path.is_file() or path.stat().st_size < _WORTH_REMEMBERING_BYTES or not (key := file_key(path)):
        return parse()
    file = memory_file("manifests", [key, {**vars(options), "caption_column": options.caption_columns}], ".safetensors")
    return Entries(remembered_columns(file, lambda: parse().table, str(path)), root)


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


def build_entries(rows: Iterable[Row], manifest: Path, root: Path, options: ManifestOptions = OUR_COLUMNS) -> Entries:
    """Check `rows` and make entries of them; raises ManifestError that lists each wrong line."""
    problems: list[tuple[int, str]] = []
    # Of ids, and of all that rows of one clip share: together they would be as large as the table.
    hashes: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]

    def chunks() -> Iterator[Mapping[str, Sequence[Any]]]:
        for chunk in chunked(rows):
            columns = _plain_columns(chunk, options) or _columns_one_by_one(chunk, options, problems)
            shared = zip(*(columns[name] for name in _SHARED), strict=True)
            hashes.append(np.array([list(map(hash, columns["id"])), list(map(hash, shared))], np.int64).T)
            yield columns

    table = joined_columns(chunks())
    ids, shared = np.concatenate(hashes).T
    entries = _joined(Entries(table, root), ids, shared, problems)
    if problems:
        refuse_lines(manifest, [f"line {line}: {text}" for line, text in sorted(problems, key=lambda known: known[0])])
    if not entries:
        raise ManifestError(f"{manifest} lists no clips")
    return entries


def _columns_one_by_one(
    rows: Sequence[Row], options: ManifestOptions, problems: list[tuple[int, str]]
) -> dict[str, Sequence[Any]]:
    """The fields of the right ones among `rows`; what is wrong with the others is added to `problems`."""
    right = []
    for line, row in rows:
        try:
            right.append(_fields(line, row, options))
        except ValueError as error:
            problems.append((line, str(error)))
    return transposed(right)


class _UnusualError(ValueError):
    """Among cells is one that `_fields` must look at."""


def _plain_columns(rows: Sequence[Row], options: ManifestOptions) -> dict[str, Sequence[Any]] | None:
    """What `_columns_one_by_one` gives of `rows`, a column at a time; None where one may be wrong, or has two captions.

    A call for each of ten cells makes reading two million rows a matter of minutes.
    """
    lines, given = zip(*rows, strict=True)
    if set(map(type, given)) != {dict}:
        return None

    alike = len(set(map(tuple, given))) == 1  # the names of rows, in order
    known = dict(zip(given[0], zip(*map(dict.values, given), strict=True), strict=True)) if alike else {}

    def cells(name: str) -> Sequence[Any]:
        return known.get(name, [None] * len(rows)) if alike else list(map(methodcaller("get", name), given))

    try:
        paths = _all_there(_texts(cells("path")))
        _require_plain_paths(paths)
        captions = [texts for name in options.caption_columns if any(texts := _texts(cells(name)))]
        ids, splits = _texts(cells("id")), _texts(cells("split"))
        return {
            "line": lines,
            "path": paths,
            "caption": _all_there(captions[0] if len(captions) == 1 else []),
            "other_captions": [()] * len(rows),
            "id": _all_there(ids)
            if options.id_column
            else [name or path for name, path in zip(ids, paths, strict=True)],
            "split": list(map(_split_names(splits).get, _all_there(splits) if options.split_column else splits)),
            "duration_seconds": _all_seconds(cells("duration_seconds")),
            **{name: _texts(cells(name)) for name in ("label", "speaker", "source", "license")},
        }
    except _UnusualError:
        return None


def _texts(cells: Sequence[Any]) -> list[str]:
    if set(map(type, cells)) == {str}:
        return list(map(str.strip, cells))
    if set(map(type, cells)) - {str, type(None)}:
        raise _UnusualError
    return [cell.strip() if cell else "" for cell in cells]


def _all_there(texts: list[str]) -> list[str]:
    if not texts or "" in texts:
        raise _UnusualError
    return texts


def _require_plain_paths(paths: Sequence[str]) -> None:
    joined = "\n".join(["", *paths])
    if any(mark in joined for mark in ("\n/", "..", "\\", ":", "\0")):
        raise _UnusualError


def _split_names(given: Iterable[str]) -> dict[str, str]:
    try:
        return {name: split_name(name) for name in set(given)}
    except ValueError as error:
        raise _UnusualError from error


def _all_seconds(cells: Sequence[Any]) -> list[float | None]:
    if set(map(type, cells)) - {int, float, str, type(None)}:
        raise _UnusualError
    try:
        seconds = [None if cell is None or cell == "" else float(cell) for cell in cells]
    except (ValueError, OverflowError) as error:
        raise _UnusualError from error
    known = np.array(seconds, np.float64)  # None is NaN
    if np.count_nonzero((known > 0) & (known < np.inf)) != len(seconds) - seconds.count(None):
        raise _UnusualError
    return seconds


def _repeated(hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a hash occurs again or has occurred `[K]`, in order."""
    order = hashes.argsort(kind="stable")
    (again,) = np.nonzero(np.diff(hashes[order]) == 0)
    return np.unique(order[np.concatenate([again, again + 1])])


def _joined(
    entries: Entries, ids: NDArray[np.int64], shared: NDArray[np.int64], problems: list[tuple[int, str]]
) -> Entries:
    """`entries`, of which those with an id that came before become one with the first, or a problem.

    `ids` and `shared` are hashes, of each entry's id and of all else but its captions and line `[N]`.
    """
    first: dict[str, int] = {}
    captions: dict[int, list[str]] = {}  # by the place of the first, all of one clip
    table, places = entries.table, _repeated(ids)
    some: dict[str, Any] = entries.take(places).table
    lines, gone = cast(NDArray[np.int64], table["line"]), np.zeros(len(entries), bool)
    for place, name, caption, others in zip(
        places.tolist(), some["id"], some["caption"], some["other_captions"], strict=True
    ):
        start = first.setdefault(name, place)
        known = captions.setdefault(start, [caption, *others])
        if start == place:
            continue
        gone[place] = True
        alike = shared[place] == shared[start] or _are_alike(entries[place], entries[start])
        if caption in known or not alike:
            problems.append((int(lines[place]), f"duplicate id {name!r}, first used on line {lines[start]}"))
        else:
            known += [new for new in (caption, *others) if new not in known]
    if not gone.any():
        return entries
    kept, lists = np.flatnonzero(~gone), table["other_captions"]
    joined = (tuple(captions[place][1:]) if place in captions else lists[place] for place in kept.tolist())
    return entries.take(kept).with_other_captions(joined)


def _are_alike(entry: ManifestEntry, first: ManifestEntry) -> bool:
    """Whether the two differ in their captions alone, though one path may be written in a longer way."""
    return replace(entry, caption=first.caption, other_captions=first.other_captions, line=first.line) == first


def build_entry(
    line: int, row: Mapping[str, Any] | str, root: Path, options: ManifestOptions = OUR_COLUMNS
) -> ManifestEntry:
    """Check one row, or what is wrong with it, and make an entry of it; raises ValueError."""
    given = _fields(line, row, options)
    return ManifestEntry(root / given[0], *given[1:])


def _fields(line: int, row: Mapping[str, Any] | str, options: ManifestOptions) -> Fields:
    row = _checked(row)
    path = _text(row, "path", required=True)
    caption, *others = captions_in(row, options.caption_columns)
    return (
        _usable(path) if options.absolute_paths else check_relative(path),
        caption,
        _text(row, "id", required=options.id_column is not None) or path,
        _duration(row),
        split_name(_text(row, "split", required=options.split_column is not None)),
        _text(row, "label"),
        _text(row, "speaker"),
        _text(row, "source"),
        _text(row, "license"),
        line,
        tuple(others),
    )


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


def of_split(entries: Entries, split: str | None, manifest: Path | str) -> Entries:
    """The entries of a split, by any of its names; None takes all; raises ValueError where it has none."""
    chosen = entries if split is None else entries.of_split(split_name(split))
    if not chosen:
        raise ValueError(f"{manifest} has no split {split!r}, only {sorted(entries.splits)}")
    return chosen


def _checked(row: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(row, str):
        raise ValueError(row)
    return row


def _text(row: Mapping[str, Any], name: str, required: bool = False) -> str:
    if isinstance(cell := row.get(name), str) and (given := cell.strip()):
        return given
    if required and name not in row:
        raise ValueError(f"`{name}` must be text and is missing: the row has {list(row)}; {_HINT}")
    if cell is None and not required:
        return ""
    text = text_in(cell, name)
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
    if _PLAIN_PATH.fullmatch(path) and ".." not in path:
        return path
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
