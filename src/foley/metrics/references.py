"""Clips that others are compared with: of a folder, or of a manifest."""

from pathlib import Path

from foley.data.manifest import OUR_COLUMNS, ManifestOptions, of_split, read_manifest
from foley.metrics.features import ClipFile, scan_directory


def read_clips(
    path: str | Path,
    split: str | None = None,
    audio_dir: str | Path | None = None,
    options: ManifestOptions = OUR_COLUMNS,
) -> list[ClipFile]:
    """The clips of a folder; of a manifest or table those of `split`, or all, which lie in `audio_dir` or beside it.

    Raises what `scan_directory` and `read_manifest` raise, FileNotFoundError where clips are not there, and ValueError
    where the split has none.
    """
    if Path(path).is_dir():
        return scan_directory(Path(path))
    entries = of_split(read_manifest(path, audio_dir, options), split, path)
    clips = [ClipFile(entry.path, entry.id, entry.label or None, entry.caption) for entry in entries]
    if absent := [str(clip.path) for clip in clips if not clip.path.is_file()]:
        raise FileNotFoundError(f"{len(absent)} of {len(clips)} clips do not exist ({absent[0]}, ...); give audio_dir=")
    return clips
