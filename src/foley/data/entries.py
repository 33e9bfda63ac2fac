"""The clips of a manifest in columns: a sequence that makes an entry when it is asked for one.

Two million entries as objects are gigabytes, which every rank holds and every loader process copies as it counts
references. Here they are a few arrays, mapped into memory where `foley.data.manifest` remembered them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from foley.core.columns import Column, Columns, TextLists, Texts

SPLIT_NAMES = ("train", "val", "test")
_NAMES = ("", *SPLIT_NAMES)
_CODES = {name: code for code, name in enumerate(_NAMES)}
_CHUNK_ROWS = 1 << 10

Fields = tuple[str, str, str, float | None, str, str, str, str, str, int, tuple[str, ...]]
"""Of a `ManifestEntry`, in order, with the path as its manifest has it."""


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


_NAMES_OF_FIELDS = tuple(field.name for field in fields(ManifestEntry))
_after_path = attrgetter(*_NAMES_OF_FIELDS[1:])
_TEXTS = ("path", "caption", "id", "label", "speaker", "source", "license")


class Entries(Sequence[ManifestEntry]):
    """Entries in columns; their paths are below `root`.

    Args:
        table: by the name of a field, all its values; or the file of them.
        rows: of the table that are meant, `[N]`, in order; None for all.
        splits: that take the place of the table's: codes `[N]`, as `split_codes`.

    >>> entries = Entries.of([ManifestEntry(Path("a.wav"), "rain", "a"), ManifestEntry(Path("b.wav"), "surf", "b")])
    >>> entries[1].caption, len(entries[:1]), entries == list(entries)
    ('surf', 1, True)
    """

    def __init__(
        self,
        table: Mapping[str, Column] | Columns,
        root: Path,
        rows: NDArray[np.int64] | None = None,
        splits: NDArray[np.uint8] | None = None,
    ) -> None:
        self._origin = table
        self._table = _mapped(table) if isinstance(table, Columns) else table
        self._rows = rows
        self._splits = splits
        self.root = root

    @classmethod
    def of(cls, entries: Sequence[ManifestEntry]) -> "Entries":
        """Of `entries`, which may be ours already."""
        if isinstance(entries, cls):
            return entries
        return cls(columns_of((str(entry.path), *_after_path(entry)) for entry in entries), Path())

    def __len__(self) -> int:
        return len(self._table["line"]) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ManifestEntry: ...
    @overload
    def __getitem__(self, index: slice) -> "Entries": ...
    def __getitem__(self, index: int | slice) -> "ManifestEntry | Entries":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place, row = self._find(index)
        code = int(cast(Any, self._table["split"])[row] if self._splits is None else self._splits[place])
        cells: dict[str, Any] = {name: self._table[name][row] for name in _NAMES_OF_FIELDS}
        seconds = float(cells["duration_seconds"])
        cells |= {"path": self.root / cells["path"], "split": _NAMES[code], "line": int(cells["line"])}
        return ManifestEntry(**cells | {"duration_seconds": None if math.isnan(seconds) else seconds})

    def _find(self, index: int) -> tuple[int, int]:
        """The place and the row of the table of an entry."""
        place = range(len(self))[index]  # negative ones count from the end
        return place, place if self._rows is None else int(self._rows[place])

    def id_of(self, index: int) -> str:
        """The id of an entry; the rest of it is not made."""
        return str(self._table["id"][self._find(index)[1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __getstate__(self) -> tuple[Any, ...]:
        return self._origin, self.root, self._rows, self._splits

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def take(self, places: NDArray[np.int64]) -> "Entries":
        """Those at `places [K]`, in that order."""
        rows = places if self._rows is None else self._rows[places]
        return Entries(self._origin, self.root, rows, None if self._splits is None else self._splits[places])

    @property
    def table(self) -> dict[str, Column]:
        """The columns of these entries."""
        columns = {name: self._column(name) for name in _NAMES_OF_FIELDS}
        return columns | {"split": self.split_codes}

    @property
    def split_codes(self) -> NDArray[np.uint8]:
        """Of each entry's split `[N]`: 0 where it has none, else its place in SPLIT_NAMES, from 1."""
        return self._numbers("split") if self._splits is None else self._splits

    @property
    def splits(self) -> list[str]:
        """The names of the splits that there are, in the order of their first entries; an empty one is a name."""
        codes, first = np.unique(self.split_codes, return_index=True)
        return [_NAMES[code] for code in codes[np.argsort(first)]]

    def with_splits(self, codes: NDArray[np.uint8]) -> "Entries":
        """The same entries in the splits of these codes `[N]`."""
        return Entries(self._origin, self.root, self._rows, codes)

    def with_other_captions(self, captions: Iterable[Sequence[str]]) -> "Entries":
        """The same entries with these in the place of their own."""
        return Entries(self.table | {"other_captions": TextLists.of(captions)}, self.root)

    def of_split(self, name: str) -> "Entries":
        """Those of the split."""
        return self.take(np.flatnonzero(self.split_codes == split_code(name)))

    @property
    def duration_seconds(self) -> NDArray[np.float64]:
        """`[N]`; NaN where it is not known."""
        return self._numbers("duration_seconds")

    @property
    def paths(self) -> Texts:
        """Below `root`, as their manifest has them `[N]`."""
        return cast(Texts, self._column("path"))

    def _numbers(self, name: str) -> NDArray[Any]:
        return cast(NDArray[Any], self._column(name))

    def _column(self, name: str) -> Column:
        column = self._table[name]
        if self._rows is None:
            return column
        return column[self._rows] if isinstance(column, np.ndarray) else column.take(self._rows)


def split_code(name: str) -> int:
    """The number of a split, as `Entries.split_codes` has it.

    >>> [split_code(name) for name in ("", "train", "test")]
    [0, 1, 3]
    """
    return _CODES[name]


def columns_of(rows: Iterable[Fields]) -> dict[str, Column]:
    """The columns of `rows`, which are read once and kept as arrays, chunk by chunk."""
    return joined_columns(map(transposed, chunked(rows)))


def chunked(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of `rows`, of a size that columns are made of at once."""
    remaining = iter(rows)
    return iter(lambda: list(islice(remaining, _CHUNK_ROWS)), [])


def transposed(rows: Sequence[Fields]) -> dict[str, Sequence[Any]]:
    """By the name of a field, those of all `rows`."""
    values = zip(*rows, strict=True) if rows else [()] * len(_NAMES_OF_FIELDS)
    return dict(zip(_NAMES_OF_FIELDS, values, strict=True))


def joined_columns(chunks: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, Column]:
    """One table of chunks, each as `transposed` gives them; each is kept as arrays before the next is asked for."""
    parts = [{name: _column(name, chunk[name]) for name in _NAMES_OF_FIELDS} for chunk in chunks]
    if not parts:
        return joined_columns([transposed(())])
    return {name: _joined([part.pop(name) for part in parts]) for name in _NAMES_OF_FIELDS}  # never all twice


def _column(name: str, values: Sequence[Any]) -> Column:
    if name in _TEXTS:
        return Texts.of(values)
    if name == "other_captions":
        return TextLists.of(values)
    if name == "split":
        return np.array([_CODES[value] for value in values], np.uint8)
    return np.array(values, np.int64 if name == "line" else np.float64)  # None is NaN


def _joined(parts: Sequence[Any]) -> Column:
    if isinstance(parts[0], Texts):
        return Texts.join(parts)
    return TextLists.join(parts) if isinstance(parts[0], TextLists) else np.concatenate(parts)


def _mapped(columns: Columns) -> dict[str, Column]:
    """The columns of a file of entries; raises DamagedFileError where one is absent or damaged."""
    numbers = {name: columns.numbers(name) for name in ("duration_seconds", "split", "line")}
    texts = {name: columns.texts(name) for name in _TEXTS}
    return {**numbers, **texts, "other_captions": columns.lists("other_captions")}
