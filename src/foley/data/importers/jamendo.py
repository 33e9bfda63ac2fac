"""The Song Describer Dataset (Manco et al. 2023): captions of music from Jamendo, for evaluation."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from foley.data.importers.annotations import AnnotationFile, one_line, read_rows, split_files


def song_describer(
    annotations: Mapping[str, str], audio_licenses: str, license: str, only_valid: bool
) -> Iterator[AnnotationFile]:
    """song_describer.csv: caption_id,track_id,caption,is_valid_subset,...,path,...; files end in `.2min.mp3`.

    Args:
        audio_licenses: audio_licenses.txt, where each track's licence and author are.
        license: of the captions, and of tracks that the file lacks.
        only_valid: leave out captions outside the validated subset; they go to the ledger.
    """
    tracks = read_licenses(Path(audio_licenses))

    def build(split: str, cells: Mapping[str, str]) -> dict[str, Any]:
        if only_valid and cells["is_valid_subset"].strip().lower() != "true":
            raise ValueError("is not in the validated subset (only_valid=true)")
        track = PurePosixPath(cells["path"])
        title, track_license = tracks.get(str(track), ("", license))
        return {
            "id": cells["caption_id"],
            "caption": one_line(cells["caption"]),
            "names": [f"{track.parent.name}/{track.stem}.2min", f"{track.stem}.2min", track.stem],
            "source": f"Song Describer: {title}" if title else "Song Describer",
            "license": track_license,
            "split": split,
        }

    for split, path in split_files(annotations):
        yield read_rows(path, ("caption_id", "caption", "is_valid_subset", "path"), partial(build, split))


def read_licenses(path: Path) -> dict[str, tuple[str, str]]:
    """Title with author, and licence, by track; blocks of three lines (path, title, licence) between empty ones."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    blocks = (block.strip().split("\n") for block in text.split("\n\n"))
    return {lines[0].strip(): (one_line(lines[1]), one_line(lines[2])) for lines in blocks if len(lines) >= 3}
