"""AudioSet (Gemmeke et al. 2017): segments with weak labels, and the strong labels of Hershey et al. 2021."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from foley.data.events import Event, describe_events
from foley.data.importers.annotations import (
    AnnotationFile,
    absent,
    parse_seconds,
    read_rows,
    split_files,
    youtube_clip,
)
from foley.data.importers.tables import table_rows
from foley.data.importers.youtube import Cells, clip_id
from foley.data.manifest import ManifestError, Row

SEGMENT_SECONDS = 10.0


def audioset(
    annotations: Mapping[str, str],
    strong: Mapping[str, str],
    class_names: Sequence[str],
    license: str,
    names: Sequence[str],
) -> Iterator[AnnotationFile]:
    """Segments of AudioSet; labels, or the description of events, stand in for captions.

    Args:
        annotations: the CSVs of weak labels, `# YTID, start_seconds, end_seconds, positive_labels` after comments.
        strong: the TSVs of strong labels, segment_id, start_time_seconds, end_time_seconds, label; rows get `events`.
            They come first, so that the weak rows of their segments are in the ledger as duplicates.
        class_names: class_labels_indices.csv (index,mid,display_name) and mid_to_display_name.tsv (no header); what
            they lack keeps its id.
        names: see `youtube_clip`.

    Raises:
        ManifestError: none of `class_names` exists.
    """
    display = _display_names([Path(path) for path in class_names])

    def about(split: str, clip: dict[str, Any]) -> dict[str, Any]:
        return {"split": split, "source": f"AudioSet, https://youtu.be/{clip['youtube_id']}", "license": license}

    def segment(split: str, cells: Cells) -> dict[str, Any]:
        clip = youtube_clip(cells["youtube_id"], cells["start_seconds"], names, end=cells["end_seconds"])
        label = ", ".join(display.get(mid.strip(), mid.strip()) for mid in cells["positive_labels"].split(","))
        return {"id": clip_id(clip), "caption": label, "label": label, **clip, **about(split, clip)}

    def described(split: str, segment_id: str, events: list[Event]) -> dict[str, Any]:
        clip = _strong_clip(segment_id, names)
        label = ", ".join(dict.fromkeys(event.name for event in events))
        times = [[event.start_seconds, event.end_seconds, event.name] for event in events]
        caption = describe_events(events, SEGMENT_SECONDS)
        return {"id": segment_id, "caption": caption, "label": label, "events": times, **clip, **about(split, clip)}

    for split, path in split_files(strong):
        yield _strong_file(path, display, partial(described, split))
    columns = ("youtube_id", "start_seconds", "end_seconds", "positive_labels")
    for split, path in split_files(annotations):
        yield read_rows(path, columns, partial(segment, split), headerless=True, comment="#", skip_spaces=True)


def _strong_clip(segment_id: str, names: Sequence[str]) -> dict[str, Any]:
    youtube_id, _, start_ms = segment_id.rpartition("_")
    if not start_ms.isdecimal():
        raise ValueError(f"segment_id {segment_id!r} does not end in its start in milliseconds")
    return youtube_clip(youtube_id, str(int(start_ms) / 1000), names)


def _strong_file(path: Path, display: Mapping[str, str], build: Any) -> AnnotationFile:
    """One row for each segment, on the line of its first event."""
    if not path.is_file():
        return absent(path)

    def rows() -> Iterator[Row]:
        segments: dict[str, tuple[int, list[Event]]] = {}
        for line, cells in table_rows(path, ("segment_id", "start_time_seconds", "end_time_seconds", "label")):
            try:
                if isinstance(cells, str):
                    raise ValueError(cells)
                segments.setdefault(cells["segment_id"], (line, []))[1].append(_event(cells, display))
            except ValueError as error:
                yield line, str(error)
        for segment_id, (line, events) in segments.items():
            try:
                yield line, build(segment_id, sorted(events))
            except ValueError as error:
                yield line, str(error)

    return AnnotationFile(path, rows())


def _event(cells: Cells, display: Mapping[str, str]) -> Event:
    start = parse_seconds(cells["start_time_seconds"], "start_time_seconds")
    end = parse_seconds(cells["end_time_seconds"], "end_time_seconds")
    return Event(start, end, display.get(cells["label"], cells["label"]))


def _display_names(paths: Sequence[Path]) -> dict[str, str]:
    present = [path for path in paths if path.is_file()]
    if not present:
        raise ManifestError(f"none of {', '.join(map(str, paths))} exists: AudioSet's labels would stay ids")
    found: dict[str, str] = {}
    for path in present:
        plain = path.suffix == ".tsv"
        columns = ("mid", "display_name") if plain else ("index", "mid", "display_name")
        for line, cells in table_rows(path, columns, headerless=plain):
            if isinstance(cells, str):
                raise ManifestError(f"{path}, line {line}: {cells}")
            found[cells["mid"]] = cells["display_name"]
    return found
