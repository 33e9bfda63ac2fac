"""The audio files of a folder, found by the names that published data sets give them."""

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from foley.core.channels import lossy_mixes
from foley.core.files import AUDIO_SUFFIXES, json_lines, write_json
from foley.core.logs import first_few, get_logger
from foley.core.reading import parse_json
from foley.core.remote import find_files, url_of
from foley.core.seeding import derive_seed
from foley.core.sharding import ALL, Shard
from foley.data.audio import AudioError, open_audio, read_audio
from foley.data.dataset import SILENCE_PEAK
from foley.data.importers.annotations import AnnotationFile
from foley.data.manifest import ManifestError, build_entry

_log = get_logger(__name__)


class AudioFolderError(ValueError):
    """There is no file by any of the names asked for, or more than one."""


class AudioFolder:
    """An index of everything that can be read as audio under `root`; it keeps file names only."""

    def __init__(self, root: Path) -> None:
        if url_of(root) is None and not root.is_dir():
            raise NotADirectoryError(f"{root} is no folder: give the folder of the audio as audio_dir")
        self.root = root
        self._by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for path in _names_below(root):
            if path.suffix.lower() in AUDIO_SUFFIXES:
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


def _names_below(root: Path) -> Iterator[PurePosixPath]:
    """Every file below `root`, relative to it; links to folders are followed, as people keep audio on other disks."""
    if url_of(root) is not None:
        yield from (PurePosixPath(path.relative_to(root)) for path in sorted(find_files(root)))
        return
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        yield from (PurePosixPath(Path(folder).relative_to(root), file) for file in sorted(files))


def _lies_in(path: str, folders: list[str]) -> bool:
    return not folders or list(PurePosixPath(path).parts[-1 - len(folders) : -1]) == folders


MANIFEST_FILE, LEDGER_FILE, SUMMARY_FILE = "manifest.jsonl", "ledger.jsonl", "summary.json"


_NUM_EXAMPLES = 3
_REMARKS = {
    "longer": "are longer than {limit}: training takes a part of them, encoding their beginning",
    "shorter": "are shorter than {limit}: silence fills them up",
    "silent": "are silent: data.drop_silent=true leaves them out",
}


class _LeftOutError(Exception):
    """A row that does not get into the manifest: the kind of fault, and the reason in words."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class _Summary:
    """What is counted while rows go by."""

    def __init__(self, duration_seconds: float | None) -> None:
        self._duration_seconds = duration_seconds
        self._left_out: Counter[str] = Counter()
        self._licenses: Counter[str] = Counter()
        self._remarks: Counter[str] = Counter({name: 0 for name in _REMARKS})
        self._examples: defaultdict[str, list[str]] = defaultdict(list)
        self._seconds = 0.0

    def leave_out(self, row: Mapping[str, Any]) -> None:
        self._left_out[row["kind"]] += 1

    def keep(self, row: Mapping[str, Any]) -> None:
        seconds = row["duration_seconds"]
        self._seconds += seconds
        self._licenses[row["license"]] += 1
        wanted = self._duration_seconds or seconds
        for name, holds in (("longer", seconds > wanted), ("shorter", seconds < wanted), ("silent", "silent" in row)):
            self._remarks[name] += holds
            if holds and len(self._examples[name]) < _NUM_EXAMPLES:
                self._examples[name].append(row["id"])

    def counts(self) -> dict[str, Any]:
        kept = self._licenses.total()
        return {
            "rows": kept + self._left_out.total(),
            "kept": kept,
            "left_out": dict(self._left_out),
            "seconds": round(self._seconds, 3),
            "licenses": dict(self._licenses.most_common()),
            **self._remarks,
        }

    def say(self) -> None:
        """Name in the log what training will change of the clips."""
        limit = f"{self._duration_seconds or 0:g} s (duration_seconds)"
        for name, count in self._remarks.items():
            if count:
                words = _REMARKS[name].format(limit=limit)
                more = ", ..." if count > _NUM_EXAMPLES else ""
                _log.warning("%d clips %s: %s%s", count, words, ", ".join(self._examples[name]), more)


def prepare_manifest(
    files: Iterable[AnnotationFile],
    audio_dir: Path,
    output_dir: Path,
    decode: bool = False,
    duration_seconds: float | None = None,
) -> dict[str, Any]:
    """Write manifest.jsonl (its paths are relative to `audio_dir`), ledger.jsonl and summary.json to `output_dir`.

    Rows are read, checked and written one by one; only ids and the names of audio files stay in memory. Every row
    is either in the manifest, with the length of its file, or in the ledger: annotation file, line, id, kind and
    reason. Kinds: bad_row, duplicate_id, no_audio_file, unusable_audio. The first usable row of an id
    is kept.

    Args:
        decode: read every sample, which also finds truncated compressed files, NaN, absurd samples and silence.
        duration_seconds: of the training to come, by which longer and shorter clips are counted.

    Returns:
        What is in summary.json: `rows`, `kept`, `left_out` by kind, `licenses`, `seconds`, `audio_files`, and of what
        is kept the clips that are `longer`, `shorter` or `silent`.

    Raises:
        ManifestError: a whole annotation file cannot be read, or no row can be kept (the ledger says why).
    """
    folder = AudioFolder(audio_dir)
    rows = (row for _, row in _checked(files, folder, decode, ALL))
    summary = _write(rows, str(audio_dir), len(folder), output_dir, duration_seconds)
    lossy_mixes.report()
    return summary


def prepare_shard(
    files: Iterable[AnnotationFile], audio_dir: Path, output_dir: Path, shard: Shard, decode: bool = False
) -> None:
    """Check the rows of a shard, for `merge_shards`: those whose id has its hash, so that it meets all of an id."""
    folder = AudioFolder(audio_dir)
    with json_lines(_shard_file(output_dir, shard)) as write:
        write({"audio_files": len(folder)})
        for place, row in _checked(files, folder, decode, shard):
            write({"place": place, "row": row})
    lossy_mixes.report()


def merge_shards(
    audio_dir: Path | str, output_dir: Path, count: int, duration_seconds: float | None = None
) -> dict[str, Any]:
    """What `prepare_manifest` writes and gives, of the rows that all shards have checked, in their order.

    Raises ManifestError as that does, and where the rows of a shard are not there.
    """
    files = [_shard_file(output_dir, Shard(number, count)) for number in range(count)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ManifestError(f"{output_dir} lacks {first_few(absent, 3)}: the same command checks all shards again")
    parts = [_shard_rows(file) for file in files]
    heads = [next(part) for part in parts]
    rows = (found["row"] for found in heapq.merge(*parts, key=lambda found: found["place"]))
    summary = _write(rows, str(audio_dir), heads[0]["audio_files"], output_dir, duration_seconds)
    for file in output_dir.glob("checked-*-of-*.jsonl"):  # of another number of shards, too
        file.unlink(missing_ok=True)
    return summary


def _shard_file(output_dir: Path, shard: Shard) -> Path:
    return output_dir / f"checked-{shard.number:05d}-of-{shard.count:05d}.jsonl"


def _shard_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            yield parse_json(line, f"{file}, line {number}", mend="remove the file, and give the command again")


def _write(
    rows: Iterable[Mapping[str, Any]], audio_dir: str, audio_files: int, output_dir: Path, seconds: float | None
) -> dict[str, Any]:
    """The manifest, the ledger and the summary of checked rows."""
    counted = _Summary(seconds)
    with json_lines(output_dir / MANIFEST_FILE) as keep, json_lines(output_dir / LEDGER_FILE) as leave_out:
        for row in rows:
            note, write = (counted.leave_out, leave_out) if "kind" in row else (counted.keep, keep)
            note(row)
            write(row)
    counted.say()
    summary = {"audio_dir": audio_dir, **counted.counts(), "audio_files": audio_files}
    write_json(output_dir / SUMMARY_FILE, summary)
    if not summary["kept"]:
        raise ManifestError(f"none of {summary['rows']} rows can be used: {output_dir / LEDGER_FILE} says why")
    return summary


def _checked(
    files: Iterable[AnnotationFile], folder: AudioFolder, decode: bool, shard: Shard
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Places among all rows, and rows of the manifest, or of the ledger, which have a `kind`; of a shard."""
    first_seen: dict[str, str] = {}
    rows = ((file.path.name, line, fields) for file in files for line, fields in file.rows)
    for place, (name, line, fields) in enumerate(rows):
        if (place if isinstance(fields, str) else _id_hash(fields["id"])) % shard.count != shard.number:
            continue
        try:
            yield place, _manifest_row(line, fields, folder, decode, first_seen, name)
        except _LeftOutError as fault:
            known = {} if isinstance(fields, str) else {"id": fields["id"]}
            yield place, {"annotations": name, "line": line, **known, "kind": fault.kind, "reason": str(fault)}


def _id_hash(id: str) -> int:
    return derive_seed("row", id.encode(errors="replace").decode())


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
        row |= _heard(entry.path, decode)
    except AudioError as error:
        raise _LeftOutError("unusable_audio", str(error)) from error
    first_seen[row["id"]] = f"{file_name}, line {line}"
    return row


def _heard(path: Path, decode: bool) -> dict[str, Any]:
    """The length of a file, and whether it is silent where every sample is read."""
    with open_audio(path) as file:
        frames, rate = file.frames, file.samplerate
    silent = decode and np.abs(read_audio(path, rate)).max() < SILENCE_PEAK
    return {"duration_seconds": round(frames / rate, 6)} | ({"silent": True} if silent else {})
