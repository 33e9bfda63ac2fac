"""Clips out of WebDataset tars, each read by its byte offset from a disk or any fsspec URL.

The `webdataset` library reads these tars too, but not here: it streams shards through shuffle buffers, and neither
their contents nor the place in the stream can be saved, so that a resumed run would have to read again all it has read.
By offset a clip is a function of its index, as of any other source: the sampler's permutation is a full shuffle, splits
the clips over ranks and workers, and resumes at the exact next batch.
"""

import io
import json
import os
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import soundfile
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from foley.data.audio_io import AudioError, FloatArray, check_samples, mix_down, resample
from foley.data.shards_index import ShardError, ShardIndex
from foley.data.types import AudioItem

TAR_BLOCK_BYTES = 512


def text_start(audio_bytes: int) -> int:
    """Bytes from the start of a clip's audio to its JSON: the audio in whole tar blocks, and the next file's header."""
    return (audio_bytes + TAR_BLOCK_BYTES - 1) // TAR_BLOCK_BYTES * TAR_BLOCK_BYTES + TAR_BLOCK_BYTES


class ShardSource:
    """The clips of one split, mono at one rate; of longer clips only the first `max_duration_seconds`.

    A damaged clip raises AudioError, so that it is skipped and counted. A shard that cannot be reached at all raises
    ShardError: to skip it would make the run depend on the network's moods.
    """

    def __init__(
        self, index: ShardIndex, split: str, sample_rate_hz: int = 24000, max_duration_seconds: float | None = None
    ) -> None:
        self.index = index
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds
        self._rows = index.rows(split)

    def __len__(self) -> int:
        return len(self._rows)

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """Of every clip, as `render` returns it."""
        seconds: NDArray[np.float32] = self.index.samples["seconds"][self._rows]
        return seconds if self.max_duration_seconds is None else seconds.clip(max=self.max_duration_seconds)

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`, the same in every epoch; raises AudioError or ShardError."""
        row = int(self._rows[index])
        shard = self.index.shards[int(self.index.samples["shard"][row])]
        place = f"{self.index.url}/{shard.name}#{row}"
        audio_bytes, text_bytes = (int(self.index.samples[name][row]) for name in ("audio_bytes", "text_bytes"))
        offset, wanted = int(self.index.samples["offset"][row]), text_start(audio_bytes) + text_bytes
        content = self._read(shard.name, offset, offset + wanted)
        if len(content) < wanted:
            raise AudioError(place, f"the shard ends early: {len(content)} of {wanted} bytes")
        fields = _fields(place, content[-text_bytes:])
        audio = self._decode(place, content[:audio_bytes])
        if fields["scale"] != 1.0:
            audio *= np.float32(fields["scale"])
        return AudioItem(torch.from_numpy(audio), fields["caption"], fields["label"], fields["id"])

    def _read(self, name: str, start: int, end: int) -> bytes:
        filesystem, root = _filesystem(self.index.url, os.getpid())
        try:
            return _read_range(filesystem, f"{root}/{name}", start, end)
        except OSError as error:
            raise ShardError(f"{self.index.url}/{name} cannot be read ({error}); check that it is reachable") from error

    def _decode(self, place: str, content: bytes) -> FloatArray:
        try:
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                rate, limit = file.samplerate, self.max_duration_seconds
                frames = -1 if limit is None else int(np.ceil(limit * rate))
                samples = file.read(frames, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise AudioError(place, f"cannot be decoded ({error})") from error
        check_samples(place, samples)
        return resample(mix_down(samples), rate, self.sample_rate_hz)


def _read_range(filesystem: Any, path: str, start: int, end: int) -> bytes:
    """Local files without fsspec's layers, which cost a tenth of the time to decode a second of sound."""
    if not isinstance(filesystem, LocalFileSystem):
        content: bytes = filesystem.cat_file(path, start, end)
        return content
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, end - start, start)
    finally:
        os.close(handle)


def _fields(place: str, text: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise AudioError(place, f"its JSON is damaged ({error})") from error
    return fields


@lru_cache(maxsize=8)
def _filesystem(url: str, process: int) -> tuple[Any, str]:
    """Of this process alone: remote file systems run threads, which a forked loader process does not inherit."""
    filesystem, root = fsspec.core.url_to_fs(url)
    return filesystem, root
