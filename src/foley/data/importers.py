"""Entries from tables: AudioCaps' own columns, and generic `audio_path,caption,split` in CSV or TSV."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from foley.data.manifest import ManifestEntry, ManifestError, Row, build_entries, read_bytes

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_RENAMED = {"audio_path": "path", "file": "path", "seconds": "duration_seconds"}


def read_table(path: Path | str, root: Path | str | None = None, split: str = "") -> list[ManifestEntry]:
    """Entries of a CSV or TSV file with a header line naming at least `path` (or `audio_path`) and `caption`.

    Args:
        root: folder of the audio (default: the table's folder).
        split: given to rows that name none.

    Raises:
        ManifestError: a missing column, or whatever `read_manifest` refuses, with the line number.
    """
    path = Path(path)
    rows = ((line, {"split": split, **_generic(fields)}) for line, fields in _table_rows(path, {"caption"}))
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
        columns = {"audiocap_id", "youtube_id", "start_time", "caption"}
        for line, fields in _table_rows(path, columns):
            yield (
                line,
                {
                    "path": file_pattern.format(**fields),
                    "id": fields["audiocap_id"],
                    "caption": fields["caption"],
                    "split": split or path.stem,
                    "source": "AudioCaps",
                },
            )

    return build_entries(rows(), path, Path(audio_dir))


def _table_rows(path: Path, columns: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    if path.suffix not in _DELIMITERS:
        raise ManifestError(f"{path}: expected a table ending in {' or '.join(_DELIMITERS)}")
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ManifestError(f"{path}, line {line}: not valid UTF-8 ({error.reason})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[path.suffix], restkey="extra cells")
    missing = columns - set(reader.fieldnames or ())
    if missing:
        raise ManifestError(f"{path}, line 1: lacks the columns {sorted(missing)}, has {reader.fieldnames}")
    for fields in reader:
        yield reader.line_num, {name: value for name, value in fields.items() if value is not None}


def _generic(fields: Mapping[str, str]) -> dict[str, str | float]:
    renamed: dict[str, str | float] = {_RENAMED.get(name, name): value for name, value in fields.items() if value != ""}
    duration = str(renamed.get("duration_seconds", ""))
    if duration.replace(".", "", 1).isdigit():
        renamed["duration_seconds"] = float(duration)
    return renamed
