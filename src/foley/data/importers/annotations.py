"""What all readers of data sets' annotations share: rows of their tables, and the names of their clips."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from foley.core.remote import local_file
from foley.data.entries import Entries
from foley.data.manifest import ManifestOptions, build_entries, build_entry
from foley.data.tables import Row, csv_rows

_YOUTUBE_ID = re.compile(r"[\w-]{11}", re.ASCII)


@dataclass(frozen=True)
class AnnotationFile:
    """The rows of one file; their fields are a manifest's, with `names` (see `AudioFolder.find`) for `path`."""

    path: Path
    rows: Iterator[Row]


def split_files(annotations: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Split and path of each file given as `{split: path}`; a split may end in digits, so that it has several."""
    for split, path in annotations.items():
        yield split.rstrip("0123456789"), local_file(path)


def absent(path: Path) -> AnnotationFile:
    """A file that is not there, as one wrong row on line 0: it goes to the ledger, and the others are read."""
    return AnnotationFile(path, iter([(0, "the annotation file does not exist")]))


def read_rows(path: Path, columns: Sequence[str], build: Any, **options: Any) -> AnnotationFile:
    """The rows of a table, each made by `build(cells)`, a ValueError of which says what is wrong with the row.

    `options` are those of `csv_rows`.
    """

    rows = _built(csv_rows(path, columns, **options), lambda line, cells: build(cells))
    return AnnotationFile(path, rows) if path.is_file() else absent(path)


def own_table(table: str, license: str = "", **options: Any) -> Iterator[AnnotationFile]:
    """A table of one's own, CSV, TSV or JSON Lines, with the columns of a manifest, or those that `options` name.

    Files are found by path or, moved elsewhere, by name.

    Args:
        license: of rows that name none.
        options: of `ManifestOptions`.
    """
    path, columns = local_file(table), ManifestOptions(**options)

    def build(line: int, row: Mapping[str, Any]) -> dict[str, Any]:
        entry, name = build_entry(line, row, path.parent, columns), PurePosixPath(str(row["path"]).strip())
        about = {"split": entry.split, "label": entry.label, "source": entry.source}
        captions: Any = [entry.caption, *entry.other_captions] if entry.other_captions else entry.caption
        names = [str(name.with_suffix("")), name.stem]
        return {"id": entry.id, "caption": captions, "names": names, **about, "license": entry.license or license}

    yield AnnotationFile(path, _built(columns.rows(path), build)) if path.is_file() else absent(path)


def _built(rows: Iterable[Row], build: Callable[[int, Any], dict[str, Any]]) -> Iterator[Row]:
    """What `build(line, row)` makes of the good rows; its ValueError is what is wrong with one."""
    for line, row in rows:
        try:
            yield line, row if isinstance(row, str) else build(line, row)
        except ValueError as error:
            yield line, str(error)


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


def read_audiocaps(
    path: Path | str, audio_dir: Path | str, file_pattern: str = "{youtube_id}_{start_time}.wav", split: str = ""
) -> Entries:
    """Entries of an AudioCaps CSV (Kim et al., NAACL 2019; columns audiocap_id, youtube_id, start_time, caption).

    Args:
        file_pattern: name of a clip under `audio_dir`; the columns are its fields.
        split: default is the file's stem (train, val, test).
    """
    path = Path(path)

    def rows() -> Iterator[Row]:
        for line, fields in csv_rows(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
            if isinstance(fields, str):
                yield line, fields
                continue
            named = {"path": _file_name(file_pattern, fields), "id": fields["audiocap_id"]}
            yield line, {**named, "caption": fields["caption"], "split": split or path.stem, "source": "AudioCaps"}

    return build_entries(rows(), path, Path(audio_dir))


def _file_name(pattern: str, fields: Mapping[str, str]) -> str:
    try:
        return pattern.format(**fields)
    except (LookupError, ValueError) as error:
        raise ValueError(f"file_pattern={pattern!r} does not fit: the columns are {sorted(fields)}") from error
