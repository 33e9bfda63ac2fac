"""Clips that others are compared with: of a folder, or of a manifest."""

from pathlib import Path

from foley.data.importers import read_entries
from foley.metrics.features import ClipFile, scan_directory


def read_clips(path: str | Path, split: str | None = None, audio_dir: str | Path | None = None) -> list[ClipFile]:
    """The clips of a folder; of a manifest or table those of `split`, or all, which lie in `audio_dir` or beside it.

    Raises what `scan_directory` and `read_entries` raise, FileNotFoundError where clips are not there, and ValueError
    where the split has none.
    """
    if Path(path).is_dir():
        return scan_directory(Path(path))
    entries = read_entries(path, audio_dir)
    clips = [ClipFile(e.path, e.id, e.label or None, e.caption) for e in entries if split in (None, e.split)]
    if not clips:
        raise ValueError(f"{path} has no split {split!r}, only {sorted({entry.split for entry in entries})}")
    if absent := [str(clip.path) for clip in clips if not clip.path.is_file()]:
        raise FileNotFoundError(f"{len(absent)} of {len(clips)} clips do not exist ({absent[0]}, ...); give audio_dir=")
    return clips
