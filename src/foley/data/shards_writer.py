"""Writes shards: every tar whole or not at all, the table and the index last, faulty clips counted and left out."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from rich.progress import track
from safetensors.numpy import save
from torch.utils.data import DataLoader

from foley.core.channels import lossy_mixes
from foley.core.files import atomic_write
from foley.core.hashing import hash_file
from foley.core.locks import only_writer
from foley.core.logs import get_logger
from foley.core.ranges import publish
from foley.data.dataset import DataFaultError, most_faults
from foley.data.manifest import ManifestEntry
from foley.data.shards import (
    COLUMNS,
    INDEX_FILE,
    LEFT_OUT_FILE,
    SAMPLES_FILE,
    TAR_BLOCK_BYTES,
    EncodedClips,
    Shard,
    ShardError,
    ShardIndex,
)

_BYTES_PER_MEGABYTE = 1 << 20
_log = get_logger(__name__)


class ShardWriter:
    """Collects clips in one tar a split, publishes tars as they fill; `finish` publishes the index.

    Tars are built in the folder `temporary` and hold no dates or names of users: the same clips give the same bytes.
    """

    def __init__(self, url: str, temporary: Path, shard_bytes: int) -> None:
        self._filesystem, self._root = fsspec.core.url_to_fs(url)
        if self._filesystem.exists(f"{self._root}/{INDEX_FILE}"):
            raise ShardError(f"{url} holds shards already; choose another output or remove them")
        self._url, self._temporary, self._shard_bytes = url, temporary, shard_bytes
        self._open: dict[str, tarfile.TarFile] = {}
        self._rows: dict[str, list[tuple[int, int, int, float]]] = {}
        self._shards: list[Shard] = []
        self._table: list[tuple[int, int, int, int, float]] = []

    def add(self, key: str, split: str, audio: bytes, text: bytes, seconds: float) -> None:
        """Append one clip to the open tar of `split`; raises ShardError where `split` is no part of a file's name."""
        if split not in self._open:
            if not re.fullmatch(r"[\w-]+", split, re.ASCII):
                raise ShardError(f"split {split!r} cannot be part of a file's name; use letters, digits, - and _")
            self._open[split] = tarfile.TarFile(self._temporary / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT)
            self._rows[split] = []
        tar = self._open[split]
        self._rows[split].append((tar.offset + TAR_BLOCK_BYTES, len(audio), len(text), seconds))
        for suffix, content in (("flac", audio), ("json", text)):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if tar.offset >= self._shard_bytes:
            self._close(split)

    def finish(self, left_out: Sequence[dict[str, str]]) -> ShardIndex:
        """Publish open tars, the clips left out, the table and, last, the index."""
        for split in list(self._open):
            self._close(split)
        columns = list(zip(*self._table, strict=True)) or [()] * len(COLUMNS)
        samples = {
            name: np.array(column, dtype) for (name, dtype), column in zip(COLUMNS.items(), columns, strict=True)
        }
        index, table = ShardIndex(self._url, self._shards, samples, len(left_out)), save(samples)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in left_out)
        about = json.dumps(index.to_json(hashlib.sha256(table).hexdigest()), indent=2) + "\n"
        for name, content in ((LEFT_OUT_FILE, lines.encode()), (SAMPLES_FILE, table), (INDEX_FILE, about.encode())):
            (self._temporary / name).write_bytes(content)
            self._publish(self._temporary / name, name)
        return index

    def close(self) -> None:
        """Close what an error has left open."""
        for tar in self._open.values():
            tar.close()

    def _close(self, split: str) -> None:
        tar, rows = self._open.pop(split), self._rows.pop(split)
        tar.close()
        file = Path(str(tar.name))
        number = sum(shard.split == split for shard in self._shards)
        name, seconds = f"{split}-{number:06d}.tar", sum(row[-1] for row in rows)
        self._publish(file, name)
        self._table += [(len(self._shards), *row) for row in rows]
        self._shards.append(Shard(name, split, len(rows), file.stat().st_size, seconds, hash_file(file)))
        file.unlink()

    def _publish(self, file: Path, name: str) -> None:
        def copy(temporary: Path) -> None:
            shutil.copyfile(file, temporary)

        publish(self._url, name, lambda path: atomic_write(path, copy))


def write_shards(
    entries: Sequence[ManifestEntry],
    url: str,
    sample_rate_hz: int | None = None,
    max_duration_seconds: float | None = None,
    subtype: str = "PCM_16",
    shard_megabytes: int = 512,
    max_fault_fraction: float = 0.05,
    num_workers: int = 0,
    downmix: str = "mean",
    channels: int = 1,
) -> ShardIndex:
    """Write the clips of a manifest to shards in the folder `url`; rows without a split are for training.

    Args:
        sample_rate_hz: of what is written; None keeps each clip's own.
        subtype: `PCM_16` or `PCM_24`.
        num_workers: processes that decode and encode; the shards are the same with any number.
        downmix, channels: of clips, as for `foley.data.audio.read_audio`.

    Raises:
        ShardError: `url` holds shards already.
        FolderInUseError: another process is writing to `url`, a folder; object stores know no such lock.
        DataFaultError: more clips than that fraction, and than one, cannot be used; fewer are listed beside the index.
    """
    clips = EncodedClips(entries, sample_rate_hz, max_duration_seconds, subtype, downmix, channels)
    left_out: list[dict[str, str]] = []
    with ExitStack() as stack:
        stack.enter_context(_only_writer_of(url))
        temporary = Path(stack.enter_context(TemporaryDirectory()))
        writer = ShardWriter(url, temporary, shard_megabytes * _BYTES_PER_MEGABYTE)
        stack.callback(writer.close)
        encoded = zip(entries, _encoded(clips, num_workers), strict=True)
        for number, (entry, (audio, seconds, text)) in enumerate(encoded):
            if audio:
                writer.add(f"{number:09d}", entry.split or "train", audio, text.encode(), seconds)
                continue
            left_out.append({"id": entry.id, "line": str(entry.line), "reason": text})
            _log.warning("leaving out line %d (%d so far): %s", entry.line, len(left_out), text)
            if len(left_out) > most_faults(len(entries), max_fault_fraction):
                raise DataFaultError(f"{len(left_out)} of {len(entries)} clips cannot be used. The last: {text}")
        lossy_mixes.report()
        return writer.finish(left_out)


@contextmanager
def _only_writer_of(url: str) -> Iterator[None]:
    """Hold a folder beside the shards, which may be copied or served as they are; object stores know no locks."""
    filesystem, root = fsspec.core.url_to_fs(url)
    if not isinstance(filesystem, LocalFileSystem):
        yield
        return
    folder = Path(root).with_name(f".{Path(root).name}.partial")
    with only_writer(folder, f"the shards of {url}"):
        try:
            yield
        finally:
            shutil.rmtree(folder)


def _encoded(clips: EncodedClips, num_workers: int) -> Iterator[tuple[bytes, float, str]]:
    loader: Any = DataLoader(clips, batch_size=None, num_workers=num_workers)
    return iter(track(loader, description="shards", total=len(clips)))
