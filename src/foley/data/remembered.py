"""What takes long to find out about a data set, found out once: by the first process, for the others and later runs.

It lies in the user's cache folder (`FOLEY_CACHE`), under names that its contents decide, and may be deleted whenever
nothing runs. Ranks that start at once wait for the first on the lock of a file, not in a process group, which none has
yet and whose patience ends.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from foley.core.columns import Column, Columns, write_columns
from foley.core.config import default_cache_dir
from foley.core.hashing import hash_json
from foley.core.logs import get_logger
from foley.core.reading import DamagedFileError

_log = get_logger(__name__)

_FORMAT = 1  # of what is remembered: another number, and nothing that was is found
_PATIENCE_SECONDS = 3600.0
_SETTLED_SECONDS = 2.0


def memory_file(kind: str, key: Any, suffix: str) -> Path:
    """Where what is known of `key`, plain data, is remembered."""
    return Path(default_cache_dir()).expanduser() / kind / f"{hash_json([_FORMAT, key])}{suffix}"


def file_key(path: Path) -> list[Any] | None:
    """What tells this content of a file from others without reading it; None where it changed just now.

    A file system counts time in steps: within one, a second change could go unnoticed.
    """
    state = path.stat()
    if time.time() - state.st_mtime < _SETTLED_SECONDS:
        return None
    return [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino]


@contextmanager
def first_process(file: Path) -> Iterator[bool]:
    """A block of which one process at a time is in, so that the first makes `file` and the others then find it.

    Gives False, and lets everyone in, where nothing can be written there, or the first takes more than an hour.
    """
    lock = FileLock(file.with_suffix(".lock"), timeout=_PATIENCE_SECONDS)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:  # also the end of patience
        _log.warning("nothing is remembered in %s (%s)", file.parent, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def remembered_columns(
    file: Path, make: Callable[[], Mapping[str, Column]], what: str
) -> Mapping[str, Column] | Columns:
    """The table in `file`, mapped, which the first process makes; as it was made where it cannot be written."""
    if known := _columns(file):
        return known
    with first_process(file) as remembers:
        if known := _columns(file):
            return known
        _log.info("reading %s, which later runs find in columns", what)
        table = make()
        if not remembers:
            return table
        try:
            write_columns(file, table)
        except OSError as error:
            _log.warning("%s is not remembered: %s", what, error)
            return table
    return Columns(file)


def _columns(file: Path) -> Columns | None:
    try:
        return Columns(file) if file.is_file() else None
    except DamagedFileError as error:
        _log.warning("%s", error)
        return None
