"""Clips as shards hold them: FLAC, and a JSON of what is known of them."""

import io
import json
from collections.abc import Sequence

import numpy as np
import soundfile
from torch.utils.data import Dataset

from foley.data.audio_io import AudioError, FloatArray, open_audio, read_audio
from foley.data.manifest import ManifestEntry


class EncodedClips(Dataset[tuple[bytes, float, str]]):
    """Clip i of a manifest as (FLAC, its seconds, its JSON), or as (nothing, 0, why it cannot be used).

    FLAC holds no sample beyond 1: louder clips are scaled down, and `scale` in the JSON undoes it.
    """

    def __init__(
        self,
        entries: Sequence[ManifestEntry],
        sample_rate_hz: int | None,
        max_duration_seconds: float | None,
        subtype: str,
    ) -> None:
        self.entries = entries
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds
        self.subtype = subtype

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[bytes, float, str]:
        entry = self.entries[index]
        try:
            rate = self.sample_rate_hz or _rate_of(entry)
            audio = read_audio(entry.path, rate, self.max_duration_seconds, entry.duration_seconds)
        except AudioError as error:
            return b"", 0.0, str(error)
        scale = max(1.0, float(np.abs(audio).max()))
        seconds = len(audio) / rate
        names = ("id", "caption", "label", "split", "speaker", "source", "license")
        fields = {name: getattr(entry, name) for name in names}
        fields |= {"duration_seconds": seconds, "sample_rate_hz": rate, "scale": scale}
        return _flac(audio / scale, rate, self.subtype), seconds, json.dumps(fields, ensure_ascii=False)


def _rate_of(entry: ManifestEntry) -> int:
    with open_audio(entry.path) as file:
        rate: int = file.samplerate
    return rate


def _flac(audio: FloatArray, rate: int, subtype: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, audio, rate, format="FLAC", subtype=subtype)
    return stream.getvalue()
