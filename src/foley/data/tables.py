"""Tables that others wrote, row by row, each right or refused with its line: CSV, TSV, JSON Lines, plain text.

Manifests, prompt files and the annotations of data sets are all read here. The content decides before the ending: JSON
Lines and an array of JSON objects are read under any name. What is wrong with a row comes in the row's place, so that
all wrong rows can be listed; what is wrong with the whole file is a `TableError`.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NoReturn

import orjson

from foley.core.reading import DamagedFileError, parse_json, whole_number
from foley.core.remote import local_file

Row = tuple[int, Mapping[str, Any] | str]
"""The line on which a row starts, with either its cells by column or what is wrong with it."""

Column = str | tuple[str, ...]
"""The name of a column, or the names that it may have."""

_SPLITS = {
    **{name: "train" for name in ("train", "training")},
    **{name: "val" for name in ("val", "valid", "validation", "validate", "dev")},
    **{name: "test" for name in ("test", "testing", "eval", "evaluation")},
}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_ENDINGS = {".json", ".jsonl", ".ndjson"}
_JSON_LINES = re.compile(r'\s*\{\s*["}]')
_JSON_ARRAY = re.compile(r"\s*\[\s*[{\]]")
_MARKS = {  # the marks of UTF-32 begin as those of UTF-16 do
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_ELEMENT = re.compile(r"\s*,?\s*([^\s,\]])")
_UNDECODED = re.compile("[\udc80-\udcff]")
_MAX_LISTED = 20
_MAX_PROBLEM_CHARACTERS = 240
_MAX_LINE_CHARACTERS = 1 << 20
_MAX_CELL_CHARACTERS = 1 << 17  # as the csv module has it
_LINES_AT_ONCE = 512
_EXACT = 2.0**53  # from here on a float may have been another integer
_HEAD_CHARACTERS = 4096


class TableError(ValueError):
    """A table that must be mended; the message names the file, the lines and the values."""


def table_rows(
    path: Path, columns: Sequence[Column] = (), text_column: str | None = None, read_mark: bool = False, hint: str = ""
) -> Iterator[Row]:
    """The rows of a file of any kind as they are read; wrong ones are messages.

    Args:
        columns: that the header of a CSV or TSV file must name; the rows of JSON are the caller's to check.
        text_column: what each line of a plain text is; None refuses files that are no table.
        read_mark: decode by a byte-order mark; otherwise a file that has one is refused.
        hint: what to do where a column is missing.

    Raises:
        TableError: no such file, one that cannot be decoded, another kind of file, a header that lacks a column or
            has one twice, a line that no row can be.
    """
    path = local_file(path)
    encoding = _encoding(path, read_mark)
    suffix, head = path.suffix.lower(), _head(path, encoding)
    if _JSON_ARRAY.match(head) or (suffix == ".json" and head.lstrip().startswith("[")):
        return _array_rows(path, encoding)
    if _JSON_LINES.match(head) or suffix in _JSON_ENDINGS:
        return _json_lines(path, encoding)
    if suffix not in _DELIMITERS and text_column is not None:
        return _text_lines(path, encoding, text_column)
    return csv_rows(path, columns, encoding=encoding, hint=hint)


def csv_rows(
    path: Path,
    columns: Sequence[Column],
    headerless: bool = False,
    comment: str | None = None,
    skip_spaces: bool = False,
    encoding: str | None = None,
    hint: str = "",
) -> Iterator[tuple[int, dict[str, str] | str]]:
    """The rows of a CSV or TSV file as they are read; wrong ones are messages.

    Args:
        columns: that the header must name; of a headerless file, all of them in order.
        comment: beginning of lines that are left out.
        skip_spaces: after a delimiter, where some tables put them.
        encoding: where the bytes are not UTF-8.
        hint: what to do where a column is missing.

    Raises:
        TableError: as `table_rows`.
    """
    delimiter = _DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        raise TableError(f"{path}: expected a table ending in .csv or .tsv, or JSON Lines: one object a line (.jsonl)")
    lines = _lines(path, encoding or _encoding(path), newline="")
    # Strict: a quote that is never closed then ends with an error near it, not with the file.
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skip_spaces, strict=True)
    names = [str(name) for name in columns] if headerless else None
    for line, cells in _numbered(reader):
        if isinstance(cells, list) and (not cells or (comment and cells[0].startswith(comment))):
            continue
        if names is None:
            names = _header(path, line, cells, columns, hint)
        else:
            yield line, cells if isinstance(cells, str) else _named(cells, names)


def captions_in(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The captions of a row, of which each of `columns` holds one, none or a list; each once.

    Raises ValueError where there is none, or one is no text.

    >>> captions_in({"caption": "rain", "captions": ["rain ", "a shower"]}, ["caption", "captions"])
    ['rain', 'a shower']
    """
    present = [column for column in columns if row.get(column) not in (None, "")] or columns[:1]
    if len(present) == 1 and isinstance(only := row.get(present[0]), str) and (caption := only.strip()):
        return [caption]  # nearly every row
    cells = [(column, cell) for column in present for cell in _as_list(row.get(column))]
    texts = [text_in(cell, column) for column, cell in cells]
    captions = list(dict.fromkeys(text for text in texts if text))
    if not captions:
        raise ValueError(f"`{columns[0]}` is empty")
    return captions


def text_in(cell: Any, column: str) -> str:
    """The text of a cell, without spaces at its ends; a whole number is one; raises ValueError."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        cell = str(cell)
    if not isinstance(cell, str):
        raise ValueError(f"`{column}` must be text, got {cell!r}")
    return cell.strip()


def refuse_lines(path: Path, problems: Sequence[str]) -> NoReturn:
    """Raise TableError that lists what is wrong in `path`, each with its line; the first 20."""
    more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    listed = "\n  ".join(_brief(problem) for problem in problems[:_MAX_LISTED])
    wrong = (
        f"{len(problems)} wrong lines; mend or remove them" if len(problems) > 1 else "1 wrong line; mend or remove it"
    )
    raise TableError(f"{path} has {wrong}:\n  {listed}{more}")


def _brief(text: str) -> str:
    return text if len(text) <= _MAX_PROBLEM_CHARACTERS else f"{text[:_MAX_PROBLEM_CHARACTERS]} ..."


def _as_list(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _encoding(path: Path, read_mark: bool = False) -> str:
    if not path.is_file():
        raise TableError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the path of a table")
    with path.open("rb") as stream:
        start = stream.read(4)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding is not None and not read_mark:
        raise TableError(f"{path}, line 1: starts with a byte-order mark; save it as UTF-8 without BOM")
    return encoding or "utf-8"


def _lines(path: Path, encoding: str, newline: str | None) -> Iterator[str]:
    """Lines with their ends; bytes that are no UTF-8 become surrogates, which `_fault` finds in their rows."""
    number = 0
    with path.open(encoding=encoding, errors="surrogateescape", newline=newline) as stream:
        try:
            for line in iter(partial(stream.readline, _MAX_LINE_CHARACTERS + 1), ""):
                number += 1
                if len(line) > _MAX_LINE_CHARACTERS:
                    raise TableError(
                        f"{path}, line {number}: is over {_MAX_LINE_CHARACTERS} characters long, which no row is"
                    )
                yield line
        except UnicodeDecodeError as error:
            raise TableError(
                f"{path}, line {number + 1} or after: not valid {error.encoding} ({error.reason})"
            ) from error


def _head(path: Path, encoding: str) -> str:
    """As much of the file as tells what it is."""
    try:
        with path.open(encoding=encoding, errors="surrogateescape") as stream:
            return stream.read(_HEAD_CHARACTERS)
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not valid {error.encoding} ({error.reason})") from error


def _text_lines(path: Path, encoding: str, column: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, encoding, newline=None), start=1):
        if text := line.strip():
            yield number, _first_fault({column: text}) or {column: text}


def _json_lines(path: Path, encoding: str) -> Iterator[Row]:
    # Only the newline ends a line: JSON strings may hold other line separators.
    lines, start = _lines(path, encoding, newline="\n"), 1
    while block := list(islice(lines, _LINES_AT_ONCE)):
        rows = _plain_rows(block)
        yield from zip(count(start), rows, strict=False) if rows else _checked_lines(start, block)
        start += len(block)


def _checked_lines(start: int, lines: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start):
        if line.strip():
            yield number, _json_row(line)


def _plain_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of lines that are as nearly all are, parsed at once; none where any line may be wrong."""
    text = f"[{','.join(lines)}]"
    if "\\u" in text or max(map(len, lines)) > _MAX_CELL_CHARACTERS:
        return []
    try:
        rows = orjson.loads(text)  # it refuses all that `parse_json` does, but does not say as much
    except ValueError:
        return []
    # A name stands before each colon of an object: where there are no more, none is there twice, no object within
    # has names, and none has spread over lines.
    if set(map(type, rows)) != {dict} or [line.count(":") for line in lines] != list(map(len, rows)):
        return []
    cells = [cell for row in rows for cell in row.values() if type(cell) is float or type(cell) is list]
    numbers = (number for cell in cells for number in (cell if type(cell) is list else [cell]) if type(number) is float)
    return [] if max(map(abs, numbers), default=0) >= _EXACT else rows


def _json_row(text: str) -> Mapping[str, Any] | str:
    if _is_undecoded(text):
        return "not valid UTF-8 JSON (it holds other bytes)"
    try:
        row = parse_json(text, "the row")
    except DamagedFileError as error:
        parsed = not isinstance(error.__cause__, json.JSONDecodeError)
        return f"{'JSON that cannot be used' if parsed else 'not valid UTF-8 JSON'} ({error.reason})"
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    if len(text) <= _MAX_CELL_CHARACTERS and "\\u0000" not in text:
        return row  # by what JSON is, no cell can be at fault
    return _first_fault(row) or row


def _array_rows(path: Path, encoding: str) -> Iterator[Row]:
    """The elements of an array of objects, each on the line where it starts."""
    text = "".join(_lines(path, encoding, newline="\n"))
    position, line, decoder = text.index("[") + 1, 1, json.JSONDecoder(parse_int=whole_number)
    counted = 0
    while match := _ELEMENT.match(text, position):
        line += text.count("\n", counted, match.start(1))
        counted = match.start(1)
        try:
            _, position = decoder.raw_decode(text, counted)
        except (ValueError, RecursionError) as error:
            raise TableError(f"{path}, line {line}: the array is damaged here ({error})") from error
        yield line, _json_row(text[counted:position])
    if not text[position:].strip().startswith("]"):
        raise TableError(f"{path}: the array that it starts with does not end")


def _numbered(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Rows with the line on which each starts; a row that the reader gives up on is a message."""
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"lines {line} to {reader.line_num} are no row ({error}): is a quote left open?"


def _header(path: Path, line: int, cells: list[str] | str, columns: Sequence[Column], hint: str) -> list[str]:
    if isinstance(cells, str):
        raise TableError(f"{path}, {cells}")
    names = [cell.strip() for cell in cells]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise TableError(
            f"{path}, line {line}: has the columns {_brief(str(twice))} twice; rename or remove one of each"
        )
    choices = [(column,) if isinstance(column, str) else column for column in columns]
    if missing := [choice[0] for choice in choices if not set(choice) & set(names)]:
        raise TableError(
            f"{path}, line {line}: lacks the columns {missing}, has {_brief(str(names))}{hint and '; '}{hint}"
        )
    return names


def _named(cells: list[str], names: Sequence[str]) -> dict[str, str] | str:
    if len(cells) != len(names):
        return f"has {len(cells)} cells where there are {len(names)} columns ({', '.join(names)}): quote commas"
    row = dict(zip(names, cells, strict=True))
    return (_fault("".join(cells)) and _first_fault(row)) or row


def _first_fault(row: Mapping[str, Any]) -> str:
    """What is wrong with the first cell that no one can have meant; nothing where all are right."""
    faults = ((name, _fault(cell)) for name, cell in row.items() if isinstance(cell, str))
    return next((f"{fault} in `{name}`" for name, fault in faults if fault), "")


def _fault(text: str) -> str:
    if _is_undecoded(text):
        return "not valid UTF-8"
    if "\0" in text:
        return "a NUL character (UTF-16 without a byte-order mark?)"
    return f"over {_MAX_CELL_CHARACTERS} characters" if len(text) > _MAX_CELL_CHARACTERS else ""


def _is_undecoded(text: str) -> bool:
    return not text.isascii() and _UNDECODED.search(text) is not None


def split_name(name: str) -> str:
    """train, val or test, whatever it is called; the empty name stays empty; raises ValueError.

    >>> [split_name(name) for name in ("Training", "valid", "dev", "eval")]
    ['train', 'val', 'val', 'test']
    """
    known = _SPLITS.get(name) or _SPLITS.get(name.strip().lower(), name)
    if known and known not in _SPLITS.values():
        raise ValueError(f"split {name!r} is none of {', '.join(_SPLITS)}; rename it")
    return known
