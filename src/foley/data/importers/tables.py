"""Rows of CSV and TSV files, one by one, and the entries of tables that are manifests.

AudioCaps' own columns, and generic `audio_path,caption,split`.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foley.data.manifest import ManifestEntry, ManifestError, Row, build_entries, read_manifest

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_RENAMED = {"audio_path": "path", "file": "path", "seconds": "duration_seconds"}


def read_entries(path: Path | str, root: Path | str | None = None) -> list[ManifestEntry]:
    """Entries of a JSONL manifest or of a CSV or TSV file, by its name; raises ManifestError."""
    return (read_manifest if Path(path).suffix == ".jsonl" else read_table)(path, root)


def read_table(path: Path | str, root: Path | str | None = None, split: str = "") -> list[ManifestEntry]:
    """Entries of a CSV or TSV file with a header line naming at least `path` (or `audio_path`) and `caption`.

    Args:
        root: folder of the audio (default: the table's folder).
        split: given to rows that name none.

    Raises:
        ManifestError: a missing column, or whatever `read_manifest` refuses, with the line number.
    """
    path = Path(path)
    rows = (
        (line, fields if isinstance(fields, str) else {"split": split, **_generic(fields)})
        for line, fields in table_rows(path, ("caption",))
    )
    return build_entries(rows, path, Path(root) if root else path.parent)


def read_audiocaps(
    path: Path | str, audio_dir: Path | str, file_pattern: str = "{youtube_id}_{start_time}.wav", split: str = ""
) -> list[ManifestEntry]:
    """Entries of an AudioCaps CSV (Kim et al., NAACL 2019; columns audiocap_id, youtube_id, start_time, caption).

    Args:
        file_pattern: name of a clip under `audio_dir`; the columns are its fields.
        split: default is the file's stem (train, val, test).
    """
    path = Path(path)

    def rows() -> Iterator[Row]:
        for line, fields in table_rows(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
            if isinstance(fields, str):
                yield line, fields
                continue
            named = {"path": file_pattern.format(**fields), "id": fields["audiocap_id"], "caption": fields["caption"]}
            yield line, {**named, "split": split or path.stem, "source": "AudioCaps"}

    return build_entries(rows(), path, Path(audio_dir))


def table_rows(
    path: Path,
    columns: Sequence[str],
    headerless: bool = False,
    comment: str | None = None,
    skip_spaces: bool = False,
    encoding: str = "utf-8",
) -> Iterator[tuple[int, dict[str, str] | str]]:
    """The rows of a CSV or TSV file as they are read: the line on which a row starts, and its cells or what is wrong.

    Args:
        columns: that the header must name; of a headerless file, all of them in order.
        comment: beginning of lines that are left out.
        skip_spaces: after a delimiter, where some tables put them.
        encoding: where the bytes are not UTF-8.

    Raises:
        ManifestError: no such file, another kind of file, a byte-order mark, or a header that lacks a column.
    """
    delimiter = _DELIMITERS.get(path.suffix)
    if delimiter is None:
        raise ManifestError(f"{path}: expected a table ending in {' or '.join(_DELIMITERS)}")
    if not path.is_file():
        raise ManifestError(f"{path} does not exist: give the path of a table")
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as stream:
        # Strict: a quote that is never closed then ends with an error near it, not with the file.
        reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=skip_spaces, strict=True)
        names = columns if headerless else None
        for line, cells in _numbered(reader):
            if line == 1:
                _refuse_mark(path, cells)
            if isinstance(cells, list) and (not cells or (comment and cells[0].startswith(comment))):
                continue
            if names is None:
                names = _header(path, line, cells, columns)
            else:
                yield line, cells if isinstance(cells, str) else _named(cells, names)


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


def _refuse_mark(path: Path, cells: list[str] | str) -> None:
    if cells and cells[0].startswith("\ufeff"):
        raise ManifestError(f"{path}, line 1: starts with a byte-order mark; save it as UTF-8 without BOM")


def _header(path: Path, line: int, cells: list[str] | str, columns: Sequence[str]) -> list[str]:
    if isinstance(cells, str):
        raise ManifestError(f"{path}, {cells}")
    if missing := set(columns) - set(cells):
        raise ManifestError(f"{path}, line {line}: lacks the columns {sorted(missing)}, has {cells}")
    return cells


def _named(cells: list[str], names: Sequence[str]) -> dict[str, str] | str:
    if len(cells) != len(names):
        return f"has {len(cells)} cells where there are {len(names)} columns ({', '.join(names)})"
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
        return "not valid UTF-8"
    return dict(zip(names, cells, strict=True))


def _generic(fields: Mapping[str, str]) -> dict[str, str | float]:
    renamed: dict[str, str | float] = {_RENAMED.get(name, name): value for name, value in fields.items() if value != ""}
    duration = str(renamed.get("duration_seconds", ""))
    if duration.replace(".", "", 1).isdigit():
        renamed["duration_seconds"] = float(duration)
    return renamed
