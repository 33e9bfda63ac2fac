"""Parts of large files by their offset, from a disk or any fsspec URL.

Mapping a file into memory reads ahead around every access: in random order most of what a cold disk gives is thrown
away. Here a read asks for its bytes alone.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from foley.core.config import default_cache_dir
from foley.core.files import replacing
from foley.core.hashing import hash_file

Range = tuple[str, int, int]
"""Bytes of a file: its name, the offset of the first, and how many."""

_MOST_OPEN = 64
_LONGEST_HEADER = 1 << 20  # bytes, of a safetensors file of ours
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}


class RangeReader:
    """Reads parts of the files of one folder; files stay open between reads, the most recently used ones.

    Handles are of one process: a forked or spawned loader process opens its own.

    Args:
        url: the folder, a path or an fsspec URL.

    >>> import tempfile; from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "numbers").write_bytes(bytes(range(100)))
    ...     bytes(RangeReader(folder).read("numbers", 40, 3))
    b'()*'
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._open: OrderedDict[str, int] = OrderedDict()  # handles, the least recently used first
        self._fetched: dict[Range, bytes] = {}
        self._process = os.getpid()

    def prefetch(self, ranges: Sequence["Range"]) -> None:
        """Ask for what will be read next: a disk works on all of it at once, a remote store answers all of it."""
        filesystem, root = filesystem_of(self.url, os.getpid())
        if not isinstance(filesystem, LocalFileSystem):
            names, starts, sizes = zip(*ranges, strict=True)
            ends = [start + size for start, size in zip(starts, sizes, strict=True)]
            paths = [f"{root}/{name}" for name in names]
            found = filesystem.cat_ranges(paths, list(starts), ends, on_error="raise")
            self._fetched = dict(zip(ranges, found, strict=True))
        elif hasattr(os, "posix_fadvise"):
            for name, offset, size in ranges:
                os.posix_fadvise(self._handle(f"{root}/{name}"), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, name: str, offset: int, size: int) -> bytearray:
        """`size` bytes of the file `name` from `offset`; raises EOFError where it ends early, and OSError."""
        filesystem, root = filesystem_of(self.url, os.getpid())
        if (fetched := self._fetched.pop((name, offset, size), None)) is not None:
            content = bytearray(fetched)
        elif isinstance(filesystem, LocalFileSystem):
            content = self._read_local(f"{root}/{name}", offset, size)
        else:
            content = bytearray(filesystem.cat_file(f"{root}/{name}", offset, offset + size))
        if len(content) < size:
            raise EOFError(f"{self.url}/{name} ends early: {len(content)} of {size} bytes from {offset}")
        return content

    def close(self) -> None:
        """Close the files of this process."""
        while self._open and self._process == os.getpid():
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    def _read_local(self, path: str, offset: int, size: int) -> bytearray:
        content, done = bytearray(size), 0
        while count := os.preadv(self._handle(path), [memoryview(content)[done:]], offset + done):
            done += count
        return content[:done]

    def _handle(self, path: str) -> int:
        if self._process != os.getpid():  # inherited handles work, but closing them is their owner's
            self._open, self._process = OrderedDict(), os.getpid()
        if path not in self._open:
            handle = os.open(path, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
            self._open[path] = handle
            if len(self._open) > _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]


@lru_cache(maxsize=8)
def filesystem_of(url: str, process: int) -> tuple[Any, str]:
    """The file system of `url`, and its path there, for this process alone (`os.getpid()`).

    Remote file systems run threads, which a forked loader process does not inherit.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    return filesystem, root


def publish(url: str, name: str, write: Callable[[Path], object]) -> None:
    """Make a file of the folder at `url`, which is made where it is absent; whole or not at all.

    Args:
        write: makes the file at a path, and there too whole or not at all, as `foley.core.files` does.
    """
    filesystem, root = filesystem_of(url, os.getpid())
    if isinstance(filesystem, LocalFileSystem):
        write(Path(root) / name)
        return
    with TemporaryDirectory() as folder:
        write(Path(folder) / name)
        filesystem.makedirs(root, exist_ok=True)
        filesystem.put_file(f"{folder}/{name}", f"{root}/{name}")  # object stores show whole objects only


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file holds: `tensors`, their dtypes, shapes and first bytes in the file; and its metadata.

    With it one tensor is read, or a part of one, of a file that lies anywhere.
    """

    tensors: Mapping[str, tuple[str, list[int], int]]
    metadata: dict[str, str]

    @classmethod
    def read(cls, reader: RangeReader, name: str) -> "TensorHeader":
        """Of the file `name`; what damage makes it raise `foley.core.reading.reading` names."""
        size = int.from_bytes(reader.read(name, 0, 8), "little")
        if not 2 <= size <= _LONGEST_HEADER:
            raise ValueError(f"its header has {size} bytes")
        stored = json.loads(reader.read(name, 8, size))
        metadata = dict(stored.pop("__metadata__", {}))
        tensors = {
            key: (about["dtype"], about["shape"], 8 + size + about["data_offsets"][0]) for key, about in stored.items()
        }
        return cls(tensors, metadata)

    def array(self, reader: RangeReader, key: str, name: str) -> NDArray[Any]:
        """The tensor `key` of the file `name`."""
        dtype, shape, start = self.tensors[key]
        size = np.dtype(_DTYPES[dtype]).itemsize * int(np.prod(shape))
        return np.frombuffer(reader.read(name, start, size), _DTYPES[dtype]).reshape(shape)


def local_copy(url: str, name: str, sha256: str) -> Path:
    """A file of a folder on this machine: where it lies, or else a copy, fetched once and kept by its hash.

    Raises ValueError where what is fetched has another hash, and FileNotFoundError.
    """
    filesystem, root = filesystem_of(url, os.getpid())
    if isinstance(filesystem, LocalFileSystem):
        return Path(root) / name
    kept = Path(default_cache_dir()).expanduser() / "fetched" / f"{sha256}{Path(name).suffix}"
    if not kept.is_file():
        with replacing(kept) as temporary:
            filesystem.get_file(f"{root}/{name}", str(temporary))
            if hash_file(temporary) != sha256:
                raise ValueError(f"{url}/{name} is not the file with the SHA-256 {sha256}")
    return kept
