"""Clips that others are compared with, of a folder or of a manifest, and to which length both sets are cropped."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from foley.core.remote import is_file, url_of
from foley.data.audio import AudioError, open_audio
from foley.data.manifest import OUR_COLUMNS, ManifestOptions
from foley.data.splits import entries_of_split
from foley.metrics.features import ClipFile, scan_directory
from foley.metrics.protocols import ProtocolError

SHORTER = "shorter"


def read_clips(
    path: str | Path,
    split: str | None = None,
    audio_dir: str | Path | None = None,
    options: ManifestOptions = OUR_COLUMNS,
    val_fraction: float = 0.0,
) -> list[ClipFile]:
    """The clips of a folder; of a manifest or table those of `split`, or all, which lie in `audio_dir` or beside it.

    `val_fraction` is of a manifest without splits, as in training (`foley.data.splits.hold_out`).

    Raises what `scan_directory` and `read_manifest` raise, FileNotFoundError where clips are not there, and ValueError
    where the split has none.
    """
    if Path(path).is_dir() or (url_of(path) is not None and not is_file(Path(path))):
        return scan_directory(Path(path))
    entries = entries_of_split(path, split, audio_dir, options, val_fraction)
    clips = [ClipFile(entry.path, entry.id, entry.label or None, entry.caption) for entry in entries]
    if absent := [str(clip.path) for clip in clips if not is_file(clip.path)]:
        raise FileNotFoundError(f"{len(absent)} of {len(clips)} clips do not exist ({absent[0]}, ...); give audio_dir=")
    return clips


def of_labels(reference: Sequence[ClipFile], samples: Sequence[ClipFile]) -> list[ClipFile]:
    """The clips of a reference whose label some sample has; raises ValueError where there is none."""
    labels = {clip.label for clip in samples if clip.label is not None}
    if found := [clip for clip in reference if clip.label in labels]:
        return found
    raise ValueError(
        f"same_labels=true: no clip of the reference has a label of the samples ({', '.join(sorted(labels)) or None}): "
        "give labels in the JSON beside each sample and in the manifest, or leave it out"
    )


def crop_length(
    crop_seconds: float | str | None, samples: Sequence[ClipFile], reference: Sequence[ClipFile]
) -> float | None:
    """Seconds of `crop_seconds`; `SHORTER` is the lower of both sets' median lengths, by the headers of their files.

    Raises ProtocolError for another word.
    """
    if crop_seconds != SHORTER:
        if isinstance(crop_seconds, str):
            raise ProtocolError(f"crop_seconds={crop_seconds} must be a number of seconds, {SHORTER}, or null")
        return crop_seconds
    lengths = [_seconds_of(clips) for clips in (samples, reference)]
    return round(min(median(seconds) for seconds in lengths if seconds), 3) if any(lengths) else None


def _seconds_of(clips: Sequence[ClipFile]) -> list[float]:
    """Of the files that can be opened; what cannot is counted where it is read."""
    found = []
    for clip in clips:
        try:
            with open_audio(clip.path) as file:
                found.append(file.frames / file.samplerate)
        except AudioError:
            continue
    return found
