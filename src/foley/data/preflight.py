"""Looks at every file before training does, and lists each that cannot be used."""

from collections.abc import Sequence
from dataclasses import dataclass

from foley.data.audio_io import AudioError, open_audio, read_audio
from foley.data.manifest import ManifestEntry
from foley.logs import get_logger

_log = get_logger(__name__)
_MAX_LISTED = 20


@dataclass(frozen=True)
class Fault:
    """A manifest entry that cannot be used, and why."""

    entry: ManifestEntry
    reason: str


def preflight(entries: Sequence[ManifestEntry], decode: bool = False) -> list[Fault]:
    """The faults among `entries`: missing, empty, undecodable and truncated files.

    Args:
        decode: read every sample too, which also finds truncated compressed files, NaN and absurd samples; without it
            only headers are read.
    """
    faults = [Fault(entry, reason) for entry in entries if (reason := _reason(entry, decode))]
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
