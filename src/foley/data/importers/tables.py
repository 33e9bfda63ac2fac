"""Rows of CSV and TSV files, entries of tables that are manifests, and what all readers of annotations share."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foley.data.manifest import ManifestEntry, ManifestError, Row, build_entries, read_manifest

_YOUTUBE_ID = re.compile(r"[\w-]{11}", re.ASCII)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_RENAMED = {"audio_path": "path", "file": "path", "seconds": "duration_seconds"}


@dataclass(frozen=True)
class AnnotationFile:
    """The rows of one file; their fields are a manifest's, with `names` (see `AudioFolder.find`) for `path`."""

    path: Path
    rows: Iterator[Row]


def split_files(annotations: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Split and path of each file given as `{split: path}`; a split may end in digits, so that it has several."""
    for split, path in annotations.items():
        yield split.rstrip("0123456789"), Path(path)


def absent(path: Path) -> AnnotationFile:
    """A file that is not there, as one wrong row on line 0: it goes to the ledger, and the others are read."""
    return AnnotationFile(path, iter([(0, "the annotation file does not exist")]))


def read_rows(path: Path, columns: Sequence[str], build: Any, **options: Any) -> AnnotationFile:
    """The rows of a table, each made by `build(cells)`, a ValueError of which says what is wrong with the row.

    `options` are those of `table_rows`.
    """

    def rows() -> Iterator[Row]:
        for line, cells in table_rows(path, columns, **options):
            if isinstance(cells, str):
                yield line, cells
                continue
            try:
                yield line, build(cells)
            except ValueError as error:
                yield line, str(error)

    return AnnotationFile(path, rows()) if path.is_file() else absent(path)


def youtube_clip(youtube_id: str, start: str | None, names: Sequence[str], **more: str) -> dict[str, Any]:
    """Fields that say which seconds of which video a clip is, and the names its file may have.

    Args:
        start: seconds; None where the annotation does not say.
        names: patterns of `youtube_id`, and with a start of `start` ("30"), `start_padded` ("000030"), `start_ms`
            and whatever is in `more`; those that lack a field are left out.

    Raises:
        ValueError: no YouTube id, or no start in seconds.
    """
    if not _YOUTUBE_ID.fullmatch(youtube_id):
        raise ValueError(f"{youtube_id!r} is no YouTube id (11 letters, digits, - and _)")
    fields: dict[str, Any] = {"youtube_id": youtube_id, **more}
    clip: dict[str, Any] = {"youtube_id": youtube_id}
    if start is not None:
        seconds = parse_seconds(start, "the start")
        fields |= {"start": f"{seconds:g}", "start_padded": f"{seconds:06.0f}", "start_ms": f"{1000 * seconds:.0f}"}
        clip["start_seconds"] = seconds
    known = [name for name in names if all(field in fields for field in re.findall(r"{(\w+)}", name))]
    return {**clip, "names": [name.format(**fields) for name in known]}


def parse_seconds(text: str, what: str) -> float:
    """A number of seconds that is not negative; raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ValueError(f"{what} must be seconds from 0 on, got {text!r}")
    return seconds


def single_spaced(text: str) -> str:
    """A caption without line breaks and repeated spaces."""
    return " ".join(text.split())


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
