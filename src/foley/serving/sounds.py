"""Sounds on their way in and out: uploads in files of their own, and clips in the formats that clients ask for."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from foley.core.rates import FloatArray, resample
from foley.data.audio import PEAK_CEILING, AudioError, open_audio
from foley.generation.result import Generation
from foley.generation.settings import GenerationSettings

_BLOCK_FRAMES = 1 << 16  # of a compressed file; encoders of libsndfile may not take minutes at once
_UPLOAD = "upload"


@dataclass(frozen=True)
class SoundFormat:
    """How a clip is sent.

    Args:
        container: as libsndfile calls it; `subtype` too, None is its default.
        media_type: of the answer.
        rates_hz: that it knows; others are resampled to the next higher one. Empty where it takes any.
    """

    container: str
    media_type: str
    subtype: str | None = None
    rates_hz: tuple[int, ...] = ()

    def rate_for(self, sample_rate_hz: int) -> int:
        """The rate at which a clip of `sample_rate_hz` is sent.

        >>> FORMATS["opus"].rate_for(44_100), FORMATS["mp3"].rate_for(44_100), FORMATS["flac"].rate_for(44_100)
        (48000, 44100, 44100)
        """
        known = self.rates_hz or (sample_rate_hz,)
        return min((rate for rate in known if rate >= sample_rate_hz), default=max(known))


FORMATS = {
    "wav": SoundFormat("WAV", "audio/wav"),
    "flac": SoundFormat("FLAC", "audio/flac", "PCM_16"),
    "mp3": SoundFormat("MP3", "audio/mpeg", None, (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "ogg": SoundFormat("OGG", "audio/ogg", "VORBIS", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "opus": SoundFormat("OGG", "audio/ogg; codecs=opus", "OPUS", (8000, 12000, 16000, 24000, 48000)),
}
"""By the names that requests use."""


@dataclass(frozen=True)
class Sound:
    """A clip as it is sent: its bytes, and what its JSON says."""

    content: bytes
    media_type: str
    facts: dict[str, Any]


def encode(made: Generation, row: int, format_name: str) -> Sound:
    """A clip of `made` in a format out of `FORMATS`; a WAV is, byte by byte, the file that `sample.py` writes.

    The other formats are made of that file, so that all say and sound the same.
    """
    form = FORMATS[format_name]
    with tempfile.TemporaryDirectory(prefix="foley-") as folder:
        stem = Path(folder) / made.write_clip(Path(folder), row, row, stem="clip")
        facts = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        wav = stem.with_suffix(".wav")
        content = wav.read_bytes() if form.container == "WAV" else _converted(wav, form)
    return Sound(content, form.media_type, _without_paths(facts))


def _converted(wav: Path, form: SoundFormat) -> bytes:
    samples, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    target = form.rate_for(rate)
    channels = [resample(channel.copy(), rate, target) for channel in samples.T]
    return _written(_within_full_scale(np.stack(channels, axis=1)), target, form)


def _within_full_scale(samples: FloatArray) -> FloatArray:
    """Only a WAV of floats holds more, as of an edit of a recording that is louder."""
    peak = float(np.abs(samples).max(initial=0.0))
    return samples * np.float32(PEAK_CEILING / peak) if peak > 1 else samples


def _written(samples: FloatArray, rate_hz: int, form: SoundFormat) -> bytes:
    buffer = BytesIO()
    shape: dict[str, Any] = {
        "samplerate": rate_hz,
        "channels": samples.shape[1],
        "format": form.container,
        "subtype": form.subtype,
    }
    with soundfile.SoundFile(buffer, "w", **shape) as file:
        for first in range(0, len(samples), _BLOCK_FRAMES):
            file.write(samples[first : first + _BLOCK_FRAMES])
    return buffer.getvalue()


def _without_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """Where an upload lay is nobody's business; its SHA-256 says which it was."""
    settings = facts["settings"]
    for source in ("edit", "init"):
        if source in settings:
            settings[source] = {**settings[source], "file": _UPLOAD}
    return facts


def receive(stream: BinaryIO, max_seconds: float) -> Path:
    """Keep an upload in a folder of its own, until `discard`; its name is ours.

    Raises ValueError for what is no audio, or lasts longer than `max_seconds`; nothing is kept then.
    """
    path = Path(tempfile.mkdtemp(prefix="foley-upload-")) / _UPLOAD
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file)
        _check_length(path, max_seconds)
    except BaseException:
        discard(path)
        raise
    return path


def _check_length(path: Path, max_seconds: float) -> None:
    try:
        with open_audio(path) as file:
            seconds = file.frames / file.samplerate
    except AudioError as error:
        reason = error.reason.replace(f"{path.parent}{os.sep}", "")
        raise ValueError(f"file: {reason}; give an audio file that can be read, such as a WAV") from error
    if seconds > max_seconds:
        raise ValueError(f"file: the recording lasts {seconds:g} s; give one of at most {max_seconds:g} s")


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
