"""One writer at a time: folders of runs, caches, shards and samples refuse the second process that writes to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".foley.lock"
"""Stays behind, empty, where a writer has been; the lock itself ends with its process, however that ends."""


class FolderInUseError(RuntimeError):
    """Another process is writing to the folder."""


@contextmanager
def only_writer(directory: Path, what: str) -> Iterator[None]:
    """Hold `directory`, which is made where it is absent, as its only writer.

    Args:
        directory: the folder.
        what: what is written there, as "this cache of latents".

    Raises FolderInUseError at once where another process, or another block of this one, holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, only_writer(Path(folder), "these clips"):
    ...     pass
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUseError(
            f"another process is writing {what} to {directory}; wait until it has ended, or give another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
