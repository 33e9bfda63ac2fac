"""Tables of millions of rows in one file that is mapped into memory, not read: numbers as arrays, texts as one blob.

A file of rows as JSON is parsed into a Python object each: at two million rows minutes, and gigabytes that every loader
process copies bit by bit as it counts references. Here a column is one array of a safetensors file; what is touched of
it is in the system's cache, once for all processes.

    numbers  NAME          [N]
    texts    NAME.utf8     all texts end to end, and NAME.ends [N], where each ends
    lists    NAME.utf8, NAME.ends [M], and NAME.counts [N], where each row's list ends among the M texts
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from foley.core.files import write_tensors
from foley.core.ranges import RangeReader, TensorHeader
from foley.core.reading import reading

_ERRORS = "surrogateescape"  # names of files are bytes, which Python shows so where they are no UTF-8


@dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """A sequence of texts in two arrays: `utf8 [bytes]` (uint8) and `ends [N]` (int64), where each ends in it.

    >>> texts = Texts.of(["a dog", "", "rain"])
    >>> texts[2], len(texts), texts.start_with("r").tolist(), list(texts.take(np.array([2, 0])))
    ('rain', 3, [False, False, True], ['rain', 'a dog'])
    """

    utf8: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Of `texts`; raises UnicodeEncodeError for half a surrogate pair, unless it is a byte of a file's name."""
        known = list(texts)
        joined = "".join(known).encode(errors=_ERRORS)
        # A character is a byte in all of them, as in most; otherwise each is encoded to know its length.
        parts: list[Any] = known if joined.isascii() else [text.encode(errors=_ERRORS) for text in known]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return cls(np.frombuffer(joined, np.uint8), lengths.cumsum())

    @classmethod
    def join(cls, parts: Sequence["Texts"]) -> "Texts":
        """One after the other."""
        before = np.cumsum([0, *(len(part.utf8) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, before, strict=False)]
        empty = np.empty(0, np.int64)
        return cls(
            np.concatenate([np.empty(0, np.uint8), *(part.utf8 for part in parts)]), np.concatenate([empty, *ends])
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # negative ones count from the end
        return self.utf8[self._start(row) : self.ends[row]].tobytes().decode(errors=_ERRORS)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _ROWS_AT_ONCE):
            ends = self.ends[first : first + _ROWS_AT_ONCE].tolist()
            start = before = self._start(first)
            content = self.utf8[before : ends[-1]].tobytes()
            for end in ends:
                yield content[start - before : end - before].decode(errors="surrogateescape")
                start = end

    def take(self, rows: NDArray[np.integer[Any]]) -> "Texts":
        """Those at `rows [K]`, in that order."""
        places, ends = _taken(self.ends, rows)
        return Texts(self.utf8[places], ends)

    def start_with(self, beginning: str) -> NDArray[np.bool_]:
        """Which of them do `[N]`."""
        wanted = np.frombuffer(beginning.encode(), np.uint8)
        found: NDArray[np.bool_] = self.ends - self.starts >= len(wanted)
        rows = np.flatnonzero(found)
        for place, byte in enumerate(wanted):
            rows = rows[self.utf8[self.starts[rows] + place] == byte]
        found = np.zeros(len(self), bool)
        found[rows] = True
        return found

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each begins `[N]`."""
        return _starts(self.ends)

    def _start(self, row: int) -> int:
        return int(self.ends[row - 1]) if row else 0


@dataclass(frozen=True, eq=False)
class TextLists(Sequence[tuple[str, ...]]):
    """A sequence of lists of texts: all `texts [M]`, and `counts [N]`, where each list ends among them.

    >>> lists = TextLists.of([["a", "b"], [], ["c"]])
    >>> lists[0], lists[1], lists[2]
    (('a', 'b'), (), ('c',))
    """

    texts: Texts
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, lists: Iterable[Sequence[str]]) -> "TextLists":
        """Of `lists`."""
        known = list(lists)
        lengths = np.fromiter(map(len, known), np.int64, len(known))
        return cls(Texts.of(chain.from_iterable(known)), lengths.cumsum())

    @classmethod
    def join(cls, parts: Sequence["TextLists"]) -> "TextLists":
        """One after the other."""
        before = np.cumsum([0, *(len(part.texts) for part in parts)])
        counts = [part.counts + start for part, start in zip(parts, before, strict=False)]
        return cls(Texts.join([part.texts for part in parts]), np.concatenate([np.empty(0, np.int64), *counts]))

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | list[tuple[str, ...]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # negative ones count from the end
        return tuple(self.texts[int(self.counts[row - 1]) if row else 0 : int(self.counts[row])])

    def take(self, rows: NDArray[np.integer[Any]]) -> "TextLists":
        """Those at `rows [K]`, in that order."""
        places, counts = _taken(self.counts, rows)
        return TextLists(self.texts.take(places), counts)


def _starts(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])


def _taken(ends: NDArray[np.int64], rows: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each element of the parts at `rows [K]` lies, where parts end at `ends [N]`; and their own ends `[K]`."""
    starts, lengths = _starts(ends)[rows], (ends - _starts(ends))[rows]
    new = lengths.cumsum()
    # A running count, moved from a part's new start to its own.
    places = np.arange(int(new[-1]) if len(new) else 0) + np.repeat(starts - (new - lengths), lengths)
    return places, new


_ROWS_AT_ONCE = 1 << 12  # of which an iteration holds a copy

Column = NDArray[Any] | Texts | TextLists
"""Numbers, texts or lists of texts, a row each."""


def write_columns(path: Path, columns: Mapping[str, Column], metadata: Mapping[str, str] | None = None) -> None:
    """Write a table as safetensors, atomically; raises ValueError where columns differ in length."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: the columns have {lengths} rows, which must be equal")
    write_tensors(path, column_tensors(columns), dict(metadata or {}))


def column_tensors(columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """The tensors that hold a table, by their names in its file."""
    arrays = {key: array for name, column in columns.items() for key, array in _arrays(name, column).items()}
    # Copies where an array is mapped: read-only memory is no tensor.
    return {key: torch.from_numpy(np.require(array, requirements=["C", "W"])) for key, array in arrays.items()}


def _arrays(name: str, column: Column) -> dict[str, NDArray[Any]]:
    if isinstance(column, TextLists):
        return {**_arrays(name, column.texts), f"{name}.counts": column.counts}
    if isinstance(column, Texts):
        return {f"{name}.utf8": column.utf8, f"{name}.ends": column.ends}
    return {name: column}


class Columns:
    """The table that `write_columns` wrote at `path`, mapped into memory; pickled, it is a path.

    Args:
        what, mend: for the DamagedFileError that another file than a table raises, as `foley.core.reading.reading`.
    """

    def __init__(self, path: Path, what: str = "a table of columns", mend: str = "make it anew") -> None:
        self.path: Path | str = path
        self._error = what, mend
        self._again: tuple[Any, ...] = Columns, (path, what, mend)
        with reading(path, what, mend), safe_open(path, framework="pt") as file:
            self.metadata: dict[str, str] = dict(file.metadata() or {})
            self._arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118

    @classmethod
    def fetch(cls, url: str, name: str, without: Sequence[str] = (), mend: str = "make it anew") -> "Columns":
        """Of the file `name` in a folder at any fsspec URL, read into memory; tensors of `without` are not."""
        columns = cls.__new__(cls)
        columns.path, columns._error = f"{url}/{name}", ("a table of columns", mend)
        columns._again = Columns.fetch, (url, name, without, mend)
        with reading(columns.path, *columns._error):
            reader = RangeReader(url)
            header = TensorHeader.read(reader, name)
            columns.metadata = header.metadata
            columns._arrays = {key: header.array(reader, key, name) for key in header.tensors if key not in without}
        return columns

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again

    def numbers(self, name: str) -> NDArray[Any]:
        """The column of that name `[N, ...]`; raises DamagedFileError where there is none."""
        with reading(self.path, *self._error):
            return self._arrays[name]

    def texts(self, name: str) -> Texts:
        """The column of texts of that name; raises DamagedFileError where it is absent or damaged."""
        with reading(self.path, *self._error):
            utf8, ends = self._arrays[f"{name}.utf8"], self._arrays[f"{name}.ends"]
            _require_places(f"{name}.ends", ends, len(utf8))
            return Texts(utf8, ends)

    def lists(self, name: str) -> TextLists:
        """The column of lists of texts of that name; raises as `texts` does."""
        texts = self.texts(name)
        with reading(self.path, *self._error):
            counts = self._arrays[f"{name}.counts"]
            _require_places(f"{name}.counts", counts, len(texts))
            return TextLists(texts, counts)


def _require_places(name: str, ends: NDArray[Any], total: int) -> None:
    """Raise ValueError unless `ends` rise and end with `total`."""
    if ends.dtype != np.int64 or ends.ndim != 1 or (int(ends[-1]) if len(ends) else 0) != total:
        raise ValueError(f"`{name}` does not end at {total}")
    if len(ends) and (int(ends[0]) < 0 or bool((np.diff(ends) < 0).any())):
        raise ValueError(f"`{name}` falls")
