"""Sounds on their way in and out: uploads in files of their own, and clips in the formats that clients ask for."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from foley.data.audio import AudioError, open_audio
from foley.generation.result import Generation
from foley.generation.settings import GenerationSettings

_UPLOAD = "upload"
_MOST_SAMPLES_A_SECOND = 2 * 192_000  # of all channels together


MEDIA_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg; codecs=opus",
}
"""Of answers, by the formats of `foley.data.audio.FORMATS`."""


@dataclass(frozen=True)
class Sound:
    """A clip as it is sent: its bytes, and what its JSON says."""

    content: bytes
    media_type: str
    facts: dict[str, Any]


def encode(made: Generation, row: int, file_format: str) -> Sound:
    """A clip of `made` in a format out of `MEDIA_TYPES`; a WAV is, byte by byte, the file that `sample.py` writes."""
    facts = _without_paths(made.describe(row, row))
    return Sound(made.encode(row, file_format), MEDIA_TYPES[file_format], facts)


def _without_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """Where an upload or an adapter lies is nobody's business; its SHA-256 says which it is."""
    settings = facts["settings"]
    named: dict[str, Any] = {
        source: {**settings[source], "file": _UPLOAD} for source in ("edit", "init") if source in settings
    }
    if "adapters" in settings:
        named["adapters"] = [{**adapter, "path": Path(adapter["path"]).name} for adapter in settings["adapters"]]
    return {**facts, "settings": {**settings, **named}}


def upload_path() -> Path:
    """Where to keep an upload, in a new folder of its own, until `discard`; its name is ours."""
    return Path(tempfile.mkdtemp(prefix="foley-upload-")) / _UPLOAD


def receive(stream: BinaryIO, path: Path, max_seconds: float) -> None:
    """Keep an upload at `path`; raises ValueError for what is no audio, or lasts longer than `max_seconds`."""
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file)
    check_length(path, max_seconds)


def check_length(path: Path, max_seconds: float) -> None:
    """Raises ValueError for what is no audio, or lasts longer than `max_seconds`."""
    with readable(path), open_audio(path) as file:
        seconds, samples = file.frames / file.samplerate, file.frames * file.channels
    if samples > (most := round(max_seconds * _MOST_SAMPLES_A_SECOND)):  # silence of many channels is a small file
        raise ValueError(f"file: the recording has {samples} samples; give one of at most {most}")
    if seconds > max_seconds:
        raise ValueError(f"file: the recording lasts {seconds:g} s; give one of at most {max_seconds:g} s")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the AudioError of a recording into a ValueError that does not say where it lies."""
    try:
        yield
    except AudioError as error:
        reason = error.reason.replace(f"{path.parent}{os.sep}", "")
        raise ValueError(f"file: {reason}; give an audio file that can be read, such as a WAV") from error


def discard(path: Path) -> None:
    """Remove an upload and its folder."""
    shutil.rmtree(path.parent, ignore_errors=True)


def in_words(error: BaseException, settings: GenerationSettings) -> str:
    """The message of an error, without the place of the upload that it may be about.

    >>> from foley.generation.editing import Variation
    >>> settings = GenerationSettings(source=Variation("/tmp/foley-upload-x1/upload"))
    >>> in_words(ValueError("init=/tmp/foley-upload-x1/upload: holds NaN"), settings)
    'init=upload: holds NaN'
    """
    if settings.source is None:
        return str(error)
    return str(error).replace(f"{Path(settings.source.file).parent}{os.sep}", "")
