"""Data sets of YouTube segments: AudioSet with weak and strong labels, AudioCaps, VGGSound, Auto-ACD, MusicCaps.

Each reader takes `annotations` (`{split: path}`), the licence that every row carries, and `names`, the patterns by
which a clip's file may be called (see `youtube_clip`), the best first.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from foley.core.remote import local_file
from foley.data.events import Event, describe_events
from foley.data.importers.annotations import (
    AnnotationFile,
    absent,
    parse_seconds,
    read_rows,
    single_spaced,
    split_files,
    youtube_clip,
)
from foley.data.tables import Row, TableError, csv_rows

Cells = dict[str, str]

SEGMENT_SECONDS = 10.0

_AUDIOSET_KEY = re.compile(r"Y([\w-]{11})", re.ASCII)
_VGGSOUND_KEY = re.compile(r"([\w-]{11})_(\d{6})", re.ASCII)
# Left by the language model around some of Auto-ACD's captions.
_PREAMBLE = re.compile(r'be: "(.+)"')


def audiocaps(annotations: Mapping[str, str], license: str, names: Sequence[str]) -> Iterator[AnnotationFile]:
    """train.csv, val.csv, test.csv of Kim et al. 2019: audiocap_id,youtube_id,start_time,caption."""

    def build(split: str, cells: Cells) -> dict[str, Any]:
        clip = youtube_clip(cells["youtube_id"], cells["start_time"], names, audiocap_id=cells["audiocap_id"])
        about = {"split": split, "source": f"AudioCaps, {_url(clip)}", "license": license}
        return {"id": cells["audiocap_id"], "caption": single_spaced(cells["caption"]), **clip, **about}

    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    for split, path in split_files(annotations):
        yield read_rows(path, columns, partial(build, split))


def vggsound(annotations: Mapping[str, str], license: str, names: Sequence[str]) -> Iterator[AnnotationFile]:
    """vggsound.csv of Chen et al. 2020, which has no header: youtube id, start in seconds, label, train or test.

    The label stands in for a caption. The key of `annotations` means nothing here: a column names the split.
    """

    def build(cells: Cells) -> dict[str, Any]:
        clip = youtube_clip(cells["youtube_id"], cells["start_seconds"], names)
        label = single_spaced(cells["label"])
        about = {"split": cells["split"], "source": f"VGGSound, {_url(clip)}", "license": license}
        return {"id": clip_id(clip), "caption": label, "label": label, **clip, **about}

    columns = ("youtube_id", "start_seconds", "label", "split")
    for _, path in split_files(annotations):
        yield read_rows(path, columns, build, headerless=True)


def autoacd(annotations: Mapping[str, str], license: str, names: Sequence[str]) -> Iterator[AnnotationFile]:
    """train.csv and test.csv of Sun et al. 2024: youtube_id,caption; see `autoacd_key`."""

    def build(split: str, cells: Cells) -> dict[str, Any]:
        youtube_id, start = autoacd_key(cells["youtube_id"])
        clip = youtube_clip(youtube_id, start, names)
        origin = "AudioSet" if start is None else "VGGSound"
        about = {"split": split, "source": f"Auto-ACD ({origin}), {_url(clip)}", "license": license}
        return {"id": cells["youtube_id"], "caption": autoacd_caption(cells["caption"]), **clip, **about}

    for split, path in split_files(annotations):
        yield read_rows(path, ("youtube_id", "caption"), partial(build, split))


def musiccaps(annotations: Mapping[str, str], license: str, names: Sequence[str]) -> Iterator[AnnotationFile]:
    """musiccaps-public.csv of Agostinelli et al. 2023: ytid,start_s,end_s,...,caption,...,is_audioset_eval.

    Clips of AudioSet's evaluation set are for testing, the others for training, whatever the key of `annotations`.
    """

    def build(cells: Cells) -> dict[str, Any]:
        clip = youtube_clip(cells["ytid"], cells["start_s"], names, end=cells["end_s"])
        split = "test" if cells["is_audioset_eval"].strip().lower() == "true" else "train"
        about = {"split": split, "source": f"MusicCaps, {_url(clip)}", "license": license}
        return {"id": clip_id(clip), "caption": single_spaced(cells["caption"]), **clip, **about}

    for _, path in split_files(annotations):
        yield read_rows(path, ("ytid", "start_s", "end_s", "caption", "is_audioset_eval"), build)


def autoacd_key(key: str) -> tuple[str, str | None]:
    """YouTube id and start of a clip of Auto-ACD: `Y<id>` is AudioSet's, `<id>_000030` VGGSound's (30 s).

    Raises ValueError for anything else.
    """
    if match := _VGGSOUND_KEY.fullmatch(key):
        return match[1], match[2]
    if match := _AUDIOSET_KEY.fullmatch(key):
        return match[1], None
    raise ValueError(f"{key!r} is neither Y<YouTube id> nor <YouTube id>_<six digits>")


def autoacd_caption(text: str) -> str:
    """A caption of Auto-ACD without the sentence that introduces some of them."""
    match = _PREAMBLE.search(text)
    return single_spaced(match[1] if match else text)


def clip_id(clip: Mapping[str, Any]) -> str:
    """`<YouTube id>_<start in milliseconds>`, as AudioSet's strong labels name their segments."""
    return f"{clip['youtube_id']}_{1000 * clip['start_seconds']:.0f}"


def _url(clip: Mapping[str, Any]) -> str:
    return f"https://youtu.be/{clip['youtube_id']}"


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
        TableError: none of `class_names` exists.
    """
    display = _display_names([local_file(path) for path in class_names])

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
        for line, cells in csv_rows(path, ("segment_id", "start_time_seconds", "end_time_seconds", "label")):
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
        raise TableError(f"none of {', '.join(map(str, paths))} exists: AudioSet's labels would stay ids")
    found: dict[str, str] = {}
    for path in present:
        plain = path.suffix == ".tsv"
        columns = ("mid", "display_name") if plain else ("index", "mid", "display_name")
        for line, cells in csv_rows(path, columns, headerless=plain):
            if isinstance(cells, str):
                raise TableError(f"{path}, line {line}: {cells}")
            found[cells["mid"]] = cells["display_name"]
    return found
