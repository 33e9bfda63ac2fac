"""Data sets whose clips are ten seconds of YouTube videos: AudioCaps, VGGSound, Auto-ACD, MusicCaps.

Each reader takes `annotations` (`{split: path}`), the licence that every row carries, and `names`, the patterns by
which a clip's file may be called (see `youtube_clip`), the best first.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from foley.data.importers.annotations import AnnotationFile, one_line, read_rows, split_files, youtube_clip

Cells = dict[str, str]

_AUDIOSET_KEY = re.compile(r"Y([\w-]{11})", re.ASCII)
_VGGSOUND_KEY = re.compile(r"([\w-]{11})_(\d{6})", re.ASCII)
# Left by the language model around some of Auto-ACD's captions.
_PREAMBLE = re.compile(r'be: "(.+)"')


def audiocaps(annotations: Mapping[str, str], license: str, names: Sequence[str]) -> Iterator[AnnotationFile]:
    """train.csv, val.csv, test.csv of Kim et al. 2019: audiocap_id,youtube_id,start_time,caption."""

    def build(split: str, cells: Cells) -> dict[str, Any]:
        clip = youtube_clip(cells["youtube_id"], cells["start_time"], names, audiocap_id=cells["audiocap_id"])
        about = {"split": split, "source": f"AudioCaps, {_url(clip)}", "license": license}
        return {"id": cells["audiocap_id"], "caption": one_line(cells["caption"]), **clip, **about}

    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    for split, path in split_files(annotations):
        yield read_rows(path, columns, partial(build, split))


def vggsound(annotations: Mapping[str, str], license: str, names: Sequence[str]) -> Iterator[AnnotationFile]:
    """vggsound.csv of Chen et al. 2020, which has no header: youtube id, start in seconds, label, train or test.

    The label stands in for a caption. The key of `annotations` means nothing here: a column names the split.
    """

    def build(cells: Cells) -> dict[str, Any]:
        clip = youtube_clip(cells["youtube_id"], cells["start_seconds"], names)
        label = one_line(cells["label"])
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
        return {"id": clip_id(clip), "caption": one_line(cells["caption"]), **clip, **about}

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
    return one_line(match[1] if match else text)


def clip_id(clip: Mapping[str, Any]) -> str:
    """`<YouTube id>_<start in milliseconds>`, as AudioSet's strong labels name their segments."""
    return f"{clip['youtube_id']}_{1000 * clip['start_seconds']:.0f}"


def _url(clip: Mapping[str, Any]) -> str:
    return f"https://youtu.be/{clip['youtube_id']}"
