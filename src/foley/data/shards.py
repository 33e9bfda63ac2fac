"""Clips out of WebDataset tars, each read by its byte offset from a disk or any fsspec URL.

`{split}-{number:06d}.tar` hold `key.flac` followed by `key.json` for every clip. `samples.safetensors` is a table of
byte offsets, 24 bytes a clip whatever its caption; `index.json` is written last and names the shards.

The `webdataset` library reads these tars too, but not here: it streams shards through shuffle buffers, and neither
their contents nor the place in the stream can be saved, so that a resumed run would have to read again all it has read.
By offset a clip is a function of its index, as of any other source: the sampler's permutation is a full shuffle, splits
the clips over ranks and workers, and resumes at the exact next batch.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import soundfile
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from safetensors.numpy import load
from torch.utils.data import Dataset

from foley.core.channels import check_downmix
from foley.core.logs import get_logger
from foley.core.ranges import filesystem_of
from foley.core.rates import FloatArray
from foley.core.reading import DamagedFileError, parse_json, reading
from foley.data.audio import AudioError, fitted, open_audio, read_audio, read_encoded
from foley.data.dataset import AudioItem
from foley.data.manifest import ManifestEntry

_log = get_logger(__name__)

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.safetensors"
LEFT_OUT_FILE = "left_out.jsonl"
FORMAT = "foley-shards-1"
COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "audio_bytes": np.int32,
    "text_bytes": np.int32,
    "seconds": np.float32,
}
"""Of the table: number of the shard, where the clip's FLAC starts, its size, the size of its JSON, its duration."""

TAR_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20


class ShardError(RuntimeError):
    """Shards that cannot be read or written; the message names the folder or the shard."""


@dataclass(frozen=True)
class Shard:
    """One tar: `num_samples` clips of `seconds` in all, of one split."""

    name: str
    split: str
    num_samples: int
    num_bytes: int
    seconds: float
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The shards of the folder `url`, the table of their clips shard by shard, and how many clips were left out."""

    url: str
    shards: list[Shard]
    samples: Mapping[str, NDArray[Any]]
    left_out: int

    @property
    def splits(self) -> list[str]:
        return sorted({shard.split for shard in self.shards})

    def rows(self, split: str) -> NDArray[np.int64]:
        """Rows of the table that belong to `split`; raises ShardError where there are none."""
        numbers = [number for number, shard in enumerate(self.shards) if shard.split == split]
        if not numbers:
            raise ShardError(f"{self.url} has no split {split!r}, only {self.splits}")
        return np.flatnonzero(np.isin(self.samples["shard"], numbers))

    def check(self, hashes: bool = False) -> None:
        """Compare every shard's size, with `hashes` its content too, with the index; raises ShardError naming each."""
        filesystem, root = fsspec.core.url_to_fs(self.url)
        faults = [
            f"{shard.name}: {fault}"
            for shard in self.shards
            if (fault := _fault(filesystem, f"{root}/{shard.name}", shard, hashes))
        ]
        if faults:
            listed = "\n  ".join(faults)
            raise ShardError(
                f"{len(faults)} of {len(self.shards)} shards in {self.url} are not as the index says; "
                f"copy or write them again:\n  {listed}"
            )

    @classmethod
    def read(cls, url: str) -> "ShardIndex":
        """The index in the folder `url`; raises ShardError where there is none that can be read."""
        filesystem, root = fsspec.core.url_to_fs(url)
        try:
            stored = json.loads(filesystem.cat_file(f"{root}/{INDEX_FILE}"))
            table = filesystem.cat_file(f"{root}/{SAMPLES_FILE}")
        except FileNotFoundError as error:
            raise ShardError(f"{url} holds no complete shards ({error}); write them: scripts/make_shards.py") from error
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{url}/{INDEX_FILE} is not valid JSON ({error}); write the shards again") from error
        try:
            with reading(f"{url}/{INDEX_FILE}", "the index of shards", "write the shards again"):
                index = cls._of(url, stored, table)
        except DamagedFileError as error:
            raise ShardError(str(error)) from error
        if index.left_out:
            _log.warning("%d clips were left out of the shards in %s; see %s", index.left_out, url, LEFT_OUT_FILE)
        return index

    @classmethod
    def _of(cls, url: str, stored: Mapping[str, Any], table: bytes) -> "ShardIndex":
        if stored.get("format") != FORMAT:
            raise ShardError(f"{url}/{INDEX_FILE} is not of the format {FORMAT}; write the shards again")
        if hashlib.sha256(table).hexdigest() != stored["samples_sha256"]:
            raise ShardError(f"{url}/{SAMPLES_FILE} is not the one of {INDEX_FILE}; write the shards again")
        return cls(url, [Shard(**shard) for shard in stored["shards"]], load(table), stored["left_out"])

    def to_json(self, samples_sha256: str) -> dict[str, Any]:
        """What `index.json` holds."""
        return {
            "format": FORMAT,
            "num_samples": sum(shard.num_samples for shard in self.shards),
            "seconds": sum(shard.seconds for shard in self.shards),
            "left_out": self.left_out,
            "samples_sha256": samples_sha256,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }


def _fault(filesystem: Any, path: str, shard: Shard, hashes: bool) -> str:
    try:
        size = filesystem.info(path)["size"]
    except FileNotFoundError:
        return "does not exist"
    if size != shard.num_bytes:
        return f"holds {size} of {shard.num_bytes} bytes"
    if hashes and hash_stream(lambda: filesystem.open(path, "rb")) != shard.sha256:
        return f"its SHA-256 is not {shard.sha256}"
    return ""


def hash_stream(open_stream: Callable[[], Any]) -> str:
    """SHA-256 of what a freshly opened stream holds, as hexadecimal."""
    digest = hashlib.sha256()
    with open_stream() as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def text_start(audio_bytes: int) -> int:
    """Bytes from the start of a clip's audio to its JSON: the audio in whole tar blocks, and the next file's header."""
    return (audio_bytes + TAR_BLOCK_BYTES - 1) // TAR_BLOCK_BYTES * TAR_BLOCK_BYTES + TAR_BLOCK_BYTES


class ShardSource:
    """The clips of one split at one rate; of longer clips only the first `max_duration_seconds`.

    `channels` is as `foley.data.audio.fitted` takes it.

    A damaged clip raises AudioError, so that it is skipped and counted. A shard that cannot be reached at all raises
    ShardError: to skip it would make the run depend on the network's moods.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        sample_rate_hz: int = 24000,
        max_duration_seconds: float | None = None,
        channels: int = 1,
    ) -> None:
        self.index = index
        self.audio_channels = channels
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds
        self._rows = index.rows(split)

    def __len__(self) -> int:
        return len(self._rows)

    def durations_seconds(self, epoch: int) -> NDArray[np.float32]:
        """Of every clip, as `render` returns it."""
        seconds: NDArray[np.float32] = self.index.samples["seconds"][self._rows]
        return seconds if self.max_duration_seconds is None else seconds.clip(max=self.max_duration_seconds)

    def clip_name(self, index: int) -> str:
        """Its shard and its row of the table: its id is in the tar."""
        row = int(self._rows[index])
        return f"{self.index.shards[int(self.index.samples['shard'][row])].name}#{row}"

    def render(self, index: int, epoch: int) -> AudioItem:
        """Clip `index`, the same in every epoch; raises AudioError or ShardError."""
        row = int(self._rows[index])
        shard = self.index.shards[int(self.index.samples["shard"][row])]
        place = f"{self.index.url}/{self.clip_name(index)}"
        audio_bytes, text_bytes = (int(self.index.samples[name][row]) for name in ("audio_bytes", "text_bytes"))
        offset, wanted = int(self.index.samples["offset"][row]), text_start(audio_bytes) + text_bytes
        content = self._read(shard.name, offset, offset + wanted)
        if len(content) < wanted:
            raise AudioError(place, f"the shard ends early: {len(content)} of {wanted} bytes")
        fields = _fields(place, content[-text_bytes:])
        audio = self._decode(place, content[:audio_bytes])
        if fields["scale"] != 1.0:
            audio *= np.float32(fields["scale"])
        others = tuple(fields.get("other_captions", ()))
        return AudioItem(torch.from_numpy(audio), fields["caption"], fields["label"], fields["id"], others)

    def _read(self, name: str, start: int, end: int) -> bytes:
        filesystem, root = filesystem_of(self.index.url, os.getpid())
        try:
            return _read_range(filesystem, f"{root}/{name}", start, end)
        except OSError as error:
            raise ShardError(f"{self.index.url}/{name} cannot be read ({error}); check that it is reachable") from error

    def _decode(self, place: str, content: bytes) -> FloatArray:
        samples, rate = read_encoded(content, place, self.max_duration_seconds)
        return fitted(samples, rate, place, self.sample_rate_hz, self.audio_channels)


def _read_range(filesystem: Any, path: str, start: int, end: int) -> bytes:
    """Local files without fsspec's layers, which cost a tenth of the time to decode a second of sound.

    Opened anew each time, where `RangeReader` keeps files open: a shard that has gone is missed at once.
    """
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
        fields: dict[str, Any] = parse_json(text.decode(), place)
    except ValueError as error:
        raise AudioError(place, f"its JSON is damaged ({error})") from error
    return fields


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
        downmix: str = "mean",
        channels: int = 1,
    ) -> None:
        self.entries = entries
        self.channels = channels
        self.downmix = check_downmix(downmix)
        self.sample_rate_hz = sample_rate_hz
        self.max_duration_seconds = max_duration_seconds
        self.subtype = subtype

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[bytes, float, str]:
        entry = self.entries[index]
        try:
            rate = self.sample_rate_hz or _rate_of(entry)
            limits = self.max_duration_seconds, entry.duration_seconds
            audio = read_audio(entry.path, rate, *limits, self.downmix, self.channels)
        except AudioError as error:
            return b"", 0.0, str(error)
        scale = max(1.0, float(np.abs(audio).max()))
        seconds = audio.shape[-1] / rate
        names = ("id", "caption", "label", "split", "speaker", "source", "license")
        fields = {name: getattr(entry, name) for name in names}
        fields |= {"duration_seconds": seconds, "sample_rate_hz": rate, "scale": scale}
        if entry.other_captions:
            fields["other_captions"] = list(entry.other_captions)
        return _flac(audio / scale, rate, self.subtype), seconds, json.dumps(fields, ensure_ascii=False)


def _rate_of(entry: ManifestEntry) -> int:
    with open_audio(entry.path) as file:
        rate: int = file.samplerate
    return rate


def _flac(audio: FloatArray, rate: int, subtype: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, audio.T, rate, format="FLAC", subtype=subtype)
    return stream.getvalue()
