"""Files at any fsspec URL for what works with paths: inputs are fetched, folders of results kept in step with theirs.

`Path("s3://bucket/a.wav")` has one slash less: a path that begins with a protocol means the URL, whoever joined it.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from foley.core.config import default_cache_dir
from foley.core.files import replacing
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.core.ranges import filesystem_of

_log = get_logger(__name__)

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)  # two characters at least: `c:/` is a disk
_OF_THIS_MACHINE = ("file", "local", "memory")
_PUBLISH_SECONDS = 120.0  # what a killed process loses at most


def url_of(path: Path | str) -> str | None:
    """The URL that a path stands for; None for a path of this machine.

    >>> url_of(Path("s3://bucket") / "a.wav"), url_of(Path("memory://x/a.wav")), url_of(Path("sounds/a.wav"))
    ('s3://bucket/a.wav', 'memory:///x/a.wav', None)
    """
    match = _URL.fullmatch(str(path))
    if match is None:
        return None
    protocol, rest = match.groups()
    return f"{protocol}:///{rest}" if protocol in _OF_THIS_MACHINE else f"{protocol}://{rest}"


def _located(path: Path | str) -> tuple[Any, str]:
    """The file system of a path that is a URL, and its path there."""
    folder, _, name = str(url_of(path)).rpartition("/")
    filesystem, root = filesystem_of(folder, os.getpid())
    return filesystem, f"{root.rstrip('/')}/{name}"


def is_file(path: Path) -> bool:
    """Whether there is a file, here or at the URL."""
    if url_of(path) is None:
        return path.is_file()
    filesystem, where = _located(path)
    return bool(filesystem.isfile(where))


def read_bytes(path: Path) -> bytes:
    """The content of a file, here or at the URL; raises FileNotFoundError, and OSError."""
    if url_of(path) is None:
        return path.read_bytes()
    filesystem, where = _located(path)
    return bytes(filesystem.cat_file(where))


def hash_of(path: Path) -> str:
    """SHA-256 of a file, here or at the URL, as hexadecimal."""
    return hash_file(path) if url_of(path) is None else hashlib.sha256(read_bytes(path)).hexdigest()


def readable(path: Path) -> Path | io.BytesIO:
    """What a reader of files opens: the path itself, or the content at its URL."""
    return path if url_of(path) is None else io.BytesIO(read_bytes(path))


def find_files(directory: Path) -> list[Path]:
    """All files below a folder, here or at the URL, as paths; raises FileNotFoundError where there is no folder."""
    if url_of(directory) is None:
        if not directory.is_dir():
            fault = "is a file, not a folder" if directory.exists() else "does not exist"
            raise FileNotFoundError(f"{directory} {fault}")
        return [path for path in directory.rglob("*") if path.is_file()]
    filesystem, where = _located(directory)
    filesystem.invalidate_cache()
    found = [str(name) for name in filesystem.find(where)]
    if not found:
        raise FileNotFoundError(f"{url_of(directory)} holds no file")
    return [directory / name.removeprefix(where).lstrip("/") for name in found]


def local_file(path: Path | str) -> Path:
    """A file of this machine: the path itself, or what is at the URL now, fetched once into the user's cache.

    An absent one is the path as given: whoever reads it says so.
    """
    if url_of(path) is None:
        return Path(path)
    filesystem, where = _located(path)
    if isinstance(filesystem, LocalFileSystem):
        return Path(where)
    if not filesystem.isfile(where):
        return Path(path)
    version = hashlib.sha256(f"{path} {filesystem.ukey(where)}".encode()).hexdigest()[:16]
    kept = Path(default_cache_dir()).expanduser() / "fetched" / version / Path(where).name
    if not kept.is_file():
        with replacing(kept) as temporary:
            filesystem.get_file(where, str(temporary))
    return kept


@contextmanager
def local_folder(output: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A folder of results on this machine: `output` itself, or for a URL one that is kept in step with it.

    What is at the URL is there when the block begins. What the block writes is at the URL every two minutes, and when
    the block ends, however it ends; hidden files, such as those that are being written, never are.

    Args:
        wanted: which of the files at the URL the block looks at, by their names from the folder on.
    """
    filesystem, root = filesystem_of(url_of(output) or output, os.getpid())
    if isinstance(filesystem, LocalFileSystem):
        yield Path(output if url_of(output) is None else root)
        return
    with TemporaryDirectory() as name:
        mirror, ended = _Mirror(output, Path(name)), Event()
        mirror.fetch(wanted)

        def publish() -> None:
            while not ended.wait(_PUBLISH_SECONDS):
                try:
                    mirror.publish()
                except OSError as error:  # a network that is away for a while ends no work of hours
                    _log.warning("%s is behind, and tried again in %g s: %s", output, _PUBLISH_SECONDS, error)

        thread = Thread(target=publish, daemon=True)
        thread.start()
        try:
            yield mirror.folder
        finally:
            ended.set()
            thread.join()
            mirror.publish()


class _Mirror:
    """A folder of this machine, and which of its files are at the URL in the state that they have here."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = str(url_of(url)), folder
        self._known: dict[str, tuple[int, int]] = {}

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        filesystem, root = filesystem_of(self.url, os.getpid())
        filesystem.invalidate_cache()  # others write there too
        for found in filesystem.find(root):
            name = str(found).removeprefix(root).lstrip("/")
            if not _is_hidden(name) and wanted(name):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(found, str(self.folder / name))
        self._known = self._states()

    def publish(self) -> None:
        """Put what changed there, and remove what is gone here."""
        filesystem, root = filesystem_of(self.url, os.getpid())
        states = self._states()
        for name in sorted(name for name, state in states.items() if self._known.get(name) != state):
            filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(self.folder / name), f"{root}/{name}")
        for name in self._known.keys() - states.keys():
            filesystem.rm_file(f"{root}/{name}")
        self._known = states

    def _states(self) -> dict[str, tuple[int, int]]:
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        states = {name: path.stat() for name, path in files.items() if not _is_hidden(name)}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
