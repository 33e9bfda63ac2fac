"""The clips that a metric judges: in memory or on disk, and how a generated clip's label is found."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class LabelledAudio(NamedTuple):
    """`audio [T]` or `[channels, T]` at the protocol's rate; equal `id`s are a pair; `caption` is the prompt."""

    audio: Tensor
    label: str | None = None
    id: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class ClipFile:
    """An audio file to be judged; `caption` is the prompt of a generated clip."""

    path: Path
    id: str
    label: str | None = None
    caption: str | None = None


def scan_directory(directory: Path) -> list[ClipFile]:
    """Every audio file below `directory` in the order of its path, with `id`, `label` and `prompt` of its sidecar JSON.

    Without a sidecar's `id` the file's stem is the id. Raises FileNotFoundError where there is no audio.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{directory} holds no audio file ({', '.join(AUDIO_SUFFIXES)}); check the path")
    return [_read_clip(path) for path in paths]


def _read_clip(path: Path) -> ClipFile:
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return ClipFile(path, path.stem)
    try:
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{sidecar} is not JSON ({error}); repair or remove this sidecar") from error
    return ClipFile(path, str(fields.get("id", path.stem)), fields.get("label"), fields.get("prompt"))


def label_from_text(text: str, labels: Iterable[str]) -> str | None:
    """The one label that `text` names as whole words (`_` reads as a space); None where no label or several are named.

    A label inside a longer one that is also named does not count: "car alarm" names `car_alarm`, not `alarm`.
    """
    words = {label: label.replace("_", " ").lower() for label in labels}
    text = text.lower().replace("_", " ")
    named = [label for label, spelled in words.items() if re.search(rf"\b{re.escape(spelled)}\b", text)]
    longest = [a for a in named if not any(a != b and words[a] in words[b] for b in named)]
    return longest[0] if len(longest) == 1 else None


def resolve_labels(
    clips: Sequence[ClipFile], captions: Mapping[str, str], named_labels: Sequence[str]
) -> list[str | None]:
    """A label per clip: its own; else that of its prompt in `captions`; else the one named in its prompt."""
    resolved = []
    for clip in clips:
        prompt = clip.caption or ""
        resolved.append(clip.label or captions.get(prompt) or label_from_text(prompt, named_labels))
    return resolved


def labels_by_caption(pairs: Iterable[tuple[str | None, str | None]]) -> dict[str, str]:
    """Caption to label from pairs of both, without captions that stand for several labels."""
    found: dict[str, set[str]] = {}
    for caption, label in pairs:
        if caption and label:
            found.setdefault(caption, set()).add(label)
    return {caption: next(iter(labels)) for caption, labels in found.items() if len(labels) == 1}
