"""Captioned clips listed in JSON Lines: one object a line, refused with the line number where it is wrong.

`preflight` looks at every file of a manifest before a run does, and lists those that cannot be used.

Fields: `path` (relative to the manifest's folder), `caption`; optional `id` (default: the path), `duration_seconds`
(alias `seconds`), `split`, `label`, `speaker`, `source`, `license`. Other fields are ignored.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from foley.core.logs import get_logger
from foley.data.audio import AudioError, open_audio, read_audio

_log = get_logger(__name__)

_MAX_LISTED = 20
_BOM = b"\xef\xbb\xbf"

Row = tuple[int, Mapping[str, Any] | str]
"""A line number with either the fields of that line or what is wrong with it."""


class ManifestError(ValueError):
    """A manifest that must be mended; the message names the file, the lines and the values."""


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


def read_manifest(path: Path | str, root: Path | str | None = None) -> list[ManifestEntry]:
    """The entries of the JSONL manifest at `path`; clips lie under `root` (default: the manifest's folder).

    Raises:
        ManifestError: bad JSON or encoding, a byte-order mark, a missing field, an empty caption, a duplicate id, a
            path that leaves the folder; every wrong line is named (the first 20).
    """
    path = Path(path)
    return build_entries(json_rows(path), path, Path(root) if root else path.parent)


def json_rows(path: Path) -> Iterator[Row]:
    """The lines of a JSONL file as they are read; raises ManifestError where it is absent or has a byte-order mark."""
    if not path.is_file():
        raise ManifestError(f"{path} does not exist: give the path of a manifest")
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if line == 1 and raw.startswith(_BOM):
                raise ManifestError(f"{path}, line 1: starts with a byte-order mark; save it as UTF-8 without BOM")
            if raw.strip():
                yield line, _parse(raw)


def checked_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL manifest as they are read, with an `id` in every good one; raises as `json_rows` does."""
    for line, fields in json_rows(path):
        try:
            yield line, {**_fields(fields), "id": build_entry(line, fields, path.parent).id}
        except ValueError as error:
            yield line, str(error)


def build_entries(rows: Iterable[Row], manifest: Path, root: Path) -> list[ManifestEntry]:
    """Check `rows` and make entries of them; raises ManifestError that lists each wrong line."""
    entries: list[ManifestEntry] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for line, fields in rows:
        try:
            entry = build_entry(line, fields, root)
            if entry.id in first_line:
                raise ValueError(f"duplicate id {entry.id!r}, first used on line {first_line[entry.id]}")
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        first_line[entry.id] = line
        entries.append(entry)
    if problems:
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "\n  ".join(problems[:_MAX_LISTED])
        raise ManifestError(f"{manifest} has {len(problems)} wrong lines; mend or remove them:\n  {listed}{more}")
    if not entries:
        raise ManifestError(f"{manifest} lists no clips")
    return entries


def _parse(raw: bytes) -> Mapping[str, Any] | str:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"not valid UTF-8 JSON ({error})"
    return fields if isinstance(fields, dict) else f"expected a JSON object, got {type(fields).__name__}"


def build_entry(line: int, fields: Mapping[str, Any] | str, root: Path) -> ManifestEntry:
    """Check one row, or what is wrong with it, and make an entry of it; raises ValueError."""
    fields = _fields(fields)
    path = _text(fields, "path", required=True)
    caption = _text(fields, "caption", required=True)
    optional = {name: _text(fields, name) for name in ("split", "label", "speaker", "source", "license")}
    return ManifestEntry(
        path=root / check_relative(path),
        caption=caption,
        id=_text(fields, "id") or path,
        duration_seconds=_duration(fields),
        line=line,
        **optional,
    )


def _fields(row: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(row, str):
        raise ValueError(row)
    return row


def _text(fields: Mapping[str, Any], name: str, required: bool = False) -> str:
    value = fields.get(name)
    if value is None and not required:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, got {value!r}")
    if required and not value.strip():
        raise ValueError(f"`{name}` is empty")
    return value.strip()


def _duration(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("duration_seconds", fields.get("seconds"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"`duration_seconds` must be a positive number, got {value!r}")
    return float(value)


def check_relative(path: str) -> str:
    """`path` where it stays inside its folder on every system; raises ValueError otherwise."""
    parts = {*PurePosixPath(path).parts, *PureWindowsPath(path).parts}
    if path.startswith(("/", "\\")) or PureWindowsPath(path).drive or ".." in parts or "\0" in path:
        raise ValueError(f"path {path!r} leaves the manifest's folder; give it relative, without `..`")
    return path


@dataclass(frozen=True)
class FaultyEntry:
    """A manifest entry that cannot be used, and why."""

    entry: ManifestEntry
    reason: str


def preflight(entries: Sequence[ManifestEntry], decode: bool = False) -> list[FaultyEntry]:
    """The faults among `entries`: missing, empty, undecodable and truncated files.

    Args:
        decode: read every sample too, which also finds truncated compressed files, NaN and absurd samples; without it
            only headers are read.
    """
    faults = [FaultyEntry(entry, reason) for entry in entries if (reason := _reason(entry, decode))]
    if faults:
        listed = "\n  ".join(f"line {fault.entry.line}: {fault.reason}" for fault in faults[:_MAX_LISTED])
        _log.warning(
            "%d of %d clips cannot be used and will be skipped:\n  %s%s",
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
