"""What a folder of shards holds, and where in it every clip lies; the folder may be at any fsspec URL.

`{split}-{number:06d}.tar` are WebDataset tars: `key.flac` followed by `key.json` for every clip. `samples.safetensors`
is a table of byte offsets, 24 bytes a clip whatever its caption; `index.json` is written last and names the shards.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from foley.logs import get_logger

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

_CHUNK_BYTES = 1 << 20
_log = get_logger(__name__)


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
        except ValueError as error:
            raise ShardError(f"{url}/{INDEX_FILE} is not valid JSON ({error}); write the shards again") from error
        if stored.get("format") != FORMAT:
            raise ShardError(f"{url}/{INDEX_FILE} is not of the format {FORMAT}; write the shards again")
        if hashlib.sha256(table).hexdigest() != stored["samples_sha256"]:
            raise ShardError(f"{url}/{SAMPLES_FILE} is not the one of {INDEX_FILE}; write the shards again")
        if stored["left_out"]:
            _log.warning("%d clips were left out of the shards in %s; see %s", stored["left_out"], url, LEFT_OUT_FILE)
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
