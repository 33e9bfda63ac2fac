"""A look at every file of a data set before a run uses it: which cannot be used, and why.

A file takes 50 microseconds where it is in memory, and a network many milliseconds: threads look at many at once, and
what was found is remembered by the contents of the table, so that it is found out once.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foley.core.files import write_json
from foley.core.logs import get_logger, process_rank
from foley.core.reading import DamagedFileError, read_json, reading
from foley.data.audio import AudioError, open_audio, read_audio
from foley.data.dataset import most_faults
from foley.data.entries import Entries, ManifestEntry
from foley.data.remembered import first_process, memory_file

_log = get_logger(__name__)

_MAX_LISTED = 20
_THREADS = 16  # they wait for the disk or the network
_CHUNK_FILES = 256
_WORTH_REMEMBERING_FILES = 5_000
_ANEW = "anew"


@dataclass(frozen=True)
class FaultyEntry:
    """A manifest entry that cannot be used, and why."""

    entry: ManifestEntry
    reason: str

    def __str__(self) -> str:
        return f"line {self.entry.line}: {self.reason}" if self.entry.line else self.reason  # a folder has no lines


def preflight(
    entries: Sequence[ManifestEntry], decode: bool = False, max_fault_fraction: float | None = None, anew: bool = False
) -> list[FaultyEntry]:
    """The faults among `entries`: missing, empty, undecodable and truncated files.

    Of many files what was found is remembered, by their paths and lengths: later runs look again at the faulty ones
    alone, which may have been mended. A file that broke since is found when it is read. Processes that start at once
    wait for the first.

    Args:
        decode: read every sample too, which also finds truncated compressed files, NaN and absurd samples; without it
            only headers are read.
        max_fault_fraction: stop looking where more than this share, and than one, are faulty.
        anew: look at every file, whatever is remembered.
    """
    entries = Entries.of(entries)
    most = math.inf if max_fault_fraction is None else most_faults(len(entries), max_fault_fraction)
    if len(entries) < _WORTH_REMEMBERING_FILES:
        found = _look(entries, range(len(entries)), decode, most)
    else:
        file = memory_file("preflight", [_content_hash(entries), decode], ".json")
        with first_process(file) as remembers:
            found = _known_or_found(entries, decode, most, None if anew or not remembers else _Record.read(file))
            if remembers:
                found.write(file)
    faults = [FaultyEntry(entries[place], reason) for place, reason in found.faults.items()]
    _warn(faults, len(entries), found.complete)
    return faults


def preflight_of_ranks(
    entries: Entries, check_files: bool | str, max_fault_fraction: float | None = None
) -> list[FaultyEntry]:
    """What `preflight` finds, for the ranks of a run together; nothing where `check_files` is false.

    At few files rank 0 looks alone, at once; from many all ranks come back when one of them has looked.

    Raises:
        ValueError: `check_files` is neither true nor false nor "anew".
    """
    if check_files not in (True, False, _ANEW):
        raise ValueError(f"check_files must be true, false or {_ANEW}, got {check_files!r}")
    if not check_files or (process_rank() > 0 and len(entries) < _WORTH_REMEMBERING_FILES):
        return []
    return preflight(entries, False, max_fault_fraction, anew=check_files == _ANEW and process_rank() == 0)


@dataclass(frozen=True)
class _Record:
    """What a look found: reasons by place, and whether every file was looked at."""

    faults: dict[int, str]
    complete: bool

    @classmethod
    def read(cls, file: Path) -> "_Record | None":
        if not file.is_file():
            return None
        try:
            known = read_json(file, "what a preflight found")
            with reading(file, "what a preflight found"):
                return cls({int(place): str(reason) for place, reason in known["faults"]}, bool(known["complete"]))
        except DamagedFileError as error:
            _log.warning("%s", error)
            return None

    def write(self, file: Path) -> None:
        try:
            write_json(file, {"complete": self.complete, "faults": list(self.faults.items())})
        except OSError as error:
            _log.warning("what the preflight found is not remembered: %s", error)


def _known_or_found(entries: Entries, decode: bool, most: float, known: _Record | None) -> _Record:
    if known is not None:
        again = _look(entries, list(known.faults), decode, most)
        if known.complete or not again.complete:
            return _Record(again.faults, known.complete and again.complete)
    return _look(entries, range(len(entries)), decode, most)


def _look(entries: Entries, places: Sequence[int], decode: bool, most: float) -> _Record:
    """Look at the entries at `places`, in threads, until more than `most` are faulty."""
    faults: dict[int, str] = {}
    chunks = [places[start : start + _CHUNK_FILES] for start in range(0, len(places), _CHUNK_FILES)]
    paths, seconds = entries.paths, entries.duration_seconds

    def look(chunk: Sequence[int]) -> dict[int, str]:
        reasons = {place: _reason(entries.root / paths[place], float(seconds[place]), decode) for place in chunk}
        return {place: reason for place, reason in reasons.items() if reason}

    with ThreadPoolExecutor(_THREADS) as pool, _progress(len(places)) as progress:
        task, start = progress.add_task("", total=len(places), rate=0.0), time.monotonic()
        looks = pool.map(look, chunks)
        for done, found in enumerate(looks, start=1):
            faults |= found
            files = min(done * _CHUNK_FILES, len(places))
            progress.update(task, completed=files, rate=files / (time.monotonic() - start))
            if len(faults) > most:
                pool.shutdown(wait=False, cancel_futures=True)
                return _Record(faults, complete=False)
    return _Record(faults, complete=True)


def _progress(count: int) -> Progress:
    """Of a look that takes long, with its rate."""
    columns = (TextColumn("files looked at"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rate = TextColumn("{task.fields[rate]:,.0f}/s")
    return Progress(*columns, rate, disable=count < _WORTH_REMEMBERING_FILES)


def _reason(path: Path, expected_seconds: float, decode: bool) -> str:
    try:
        with open_audio(path, None if math.isnan(expected_seconds) else expected_seconds) as file:
            rate = file.samplerate
        if decode:
            read_audio(path, rate)
    except AudioError as error:
        return str(error)
    return ""


def _content_hash(entries: Entries) -> str:
    """Of what a look depends on: where the files are, and how long they should be."""
    digest = hashlib.sha256(str(entries.root.resolve()).encode(errors="surrogateescape"))
    for column in (entries.paths.utf8, entries.paths.ends, entries.duration_seconds):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _warn(faults: Sequence[FaultyEntry], total: int, complete: bool) -> None:
    if not faults:
        return
    more = len(faults) - _MAX_LISTED
    _log.warning(
        "%d of %d clips cannot be used%s:\n  %s%s",
        len(faults),
        total,
        "" if complete else ", and not all were looked at",
        "\n  ".join(map(str, faults[:_MAX_LISTED])),
        f"\n  and {more} more" if more > 0 else "",
    )
