"""The audio files of a folder, found by the names that published data sets give them."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from foley.core.files import json_lines, write_json
from foley.data.audio import AudioError, open_audio, read_audio
from foley.data.importers.annotations import AnnotationFile
from foley.data.manifest import ManifestError, build_entry

SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au"})


class AudioFolderError(ValueError):
    """There is no file by any of the names asked for, or more than one."""


class AudioFolder:
    """An index of everything that can be read as audio under `root`; it keeps file names only."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is no folder: give the folder of the audio as audio_dir")
        self.root = root
        self._by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            relative = Path(folder).relative_to(root)
            for file in sorted(files):
                path = PurePosixPath(relative, file)
                if path.suffix.lower() in SUFFIXES:
                    self._by_stem[path.stem].append(str(path))

    def __len__(self) -> int:
        return sum(map(len, self._by_stem.values()))

    @property
    def files(self) -> list[str]:
        """Every path, relative to the root, sorted."""
        return sorted(path for paths in self._by_stem.values() for path in paths)

    def find(self, names: list[str]) -> str:
        """The path, relative to the root, of the file that the first of `names` to fit one names.

        A name has no extension; folders in it must be those that the file lies in.

        Raises:
            AudioFolderError: no file has any of the names, or several have the same one.
        """
        for name in names:
            *folders, stem = PurePosixPath(name).parts or ("",)
            found = [path for path in self._by_stem.get(stem, ()) if _lies_in(path, folders)]
            if len(found) > 1:
                raise AudioFolderError(f"{len(found)} files are named {name!r}: {', '.join(found[:3])}")
            if found:
                return found[0]
        raise AudioFolderError(f"no audio file is named {' or '.join(map(repr, names))}")


def _lies_in(path: str, folders: list[str]) -> bool:
    return not folders or list(PurePosixPath(path).parts[-1 - len(folders) : -1]) == folders


MANIFEST_FILE, LEDGER_FILE, SUMMARY_FILE = "manifest.jsonl", "ledger.jsonl", "summary.json"


class _LeftOutError(Exception):
    """A row that does not get into the manifest: the kind of fault, and the reason in words."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def prepare_manifest(
    files: Iterable[AnnotationFile], audio_dir: Path, output_dir: Path, decode: bool = False
) -> dict[str, Any]:
    """Write manifest.jsonl (its paths are relative to `audio_dir`), ledger.jsonl and summary.json to `output_dir`.

    Rows are read, checked and written one by one; only ids and the names of audio files stay in memory. Every row
    is either in the manifest, with the length of its file, or in the ledger: annotation file, line, id, kind and
    reason. Kinds: bad_row, duplicate_id, no_audio_file, unusable_audio. The first usable row of an id
    is kept.

    Args:
        decode: read every sample, which also finds truncated compressed files, NaN and absurd samples.

    Returns:
        What is in summary.json: `rows`, `kept`, `left_out` by kind, `licenses`, `seconds`, `audio_files`.

    Raises:
        ManifestError: a whole annotation file cannot be read, or no row can be kept (the ledger says why).
    """
    folder = AudioFolder(audio_dir)
    counts: Counter[str] = Counter()
    licenses: Counter[str] = Counter()
    seconds = 0.0
    with json_lines(output_dir / MANIFEST_FILE) as keep, json_lines(output_dir / LEDGER_FILE) as leave_out:
        for row in _checked(files, folder, decode):
            if "kind" in row:
                counts[row["kind"]] += 1
                leave_out(row)
                continue
            counts["kept"] += 1
            licenses[row["license"]] += 1
            seconds += row["duration_seconds"]
            keep(row)
    kept = counts.pop("kept", 0)
    summary = {
        "audio_dir": str(audio_dir),
        "rows": kept + counts.total(),
        "kept": kept,
        "left_out": dict(counts),
        "seconds": round(seconds, 3),
        "licenses": dict(licenses.most_common()),
        "audio_files": len(folder),
    }
    write_json(output_dir / SUMMARY_FILE, summary)
    if not kept:
        raise ManifestError(f"none of {summary['rows']} rows can be used: {output_dir / LEDGER_FILE} says why")
    return summary


def _checked(files: Iterable[AnnotationFile], folder: AudioFolder, decode: bool) -> Iterator[dict[str, Any]]:
    """Rows of the manifest, and of the ledger, which have a `kind`."""
    first_seen: dict[str, str] = {}
    for file in files:
        for line, fields in file.rows:
            try:
                yield _manifest_row(line, fields, folder, decode, first_seen, file.path.name)
            except _LeftOutError as fault:
                known = {} if isinstance(fields, str) else {"id": fields["id"]}
                where = {"annotations": file.path.name, "line": line}
                yield {**where, **known, "kind": fault.kind, "reason": str(fault)}


def _manifest_row(
    line: int,
    fields: Mapping[str, Any] | str,
    folder: AudioFolder,
    decode: bool,
    first_seen: dict[str, str],
    file_name: str,
) -> dict[str, Any]:
    if isinstance(fields, str):
        raise _LeftOutError("bad_row", fields)
    row = {name: value for name, value in fields.items() if name != "names"}
    if row["id"] in first_seen:
        raise _LeftOutError("duplicate_id", f"id {row['id']!r} was first used in {first_seen[row['id']]}")
    try:
        row["path"] = folder.find(fields["names"])
    except AudioFolderError as error:
        raise _LeftOutError("no_audio_file", str(error)) from error
    try:
        entry = build_entry(line, row, folder.root)
    except ValueError as error:
        raise _LeftOutError("bad_row", str(error)) from error
    try:
        row["duration_seconds"] = _seconds(entry.path, decode)
    except AudioError as error:
        raise _LeftOutError("unusable_audio", str(error)) from error
    first_seen[row["id"]] = f"{file_name}, line {line}"
    return row


def _seconds(path: Path, decode: bool) -> float:
    with open_audio(path) as file:
        frames, rate = file.frames, file.samplerate
    if decode:
        read_audio(path, rate)
    return round(frames / rate, 6)
