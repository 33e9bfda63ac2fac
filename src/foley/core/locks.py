"""One at a time: a folder refuses the second process that writes to it, a model lets the second thread wait, and what
belongs to one run refuses the threads of others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from filelock import FileLock, Timeout

LOCK_FILE = ".foley.lock"
"""Stays behind, empty, where a writer has been; the lock itself ends with its process, however that ends."""


# By the model, not in it: a lock can be neither copied nor pickled.
_model_locks: WeakKeyDictionary[object, Any] = WeakKeyDictionary()
_adding = Lock()


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


@contextmanager
def sole_user(model: object) -> Iterator[None]:
    """Hold `model` for this thread; others wait, and this thread may enter again.

    Accelerators replace forwards inside the model, and caches keep layers' outputs between its evaluations: a second
    generation that began meanwhile would run through the first one's cache.

    >>> class Model: ...
    >>> model = Model()
    >>> with sole_user(model), sole_user(model):
    ...     pass
    """
    with _adding:
        lock = _model_locks.setdefault(model, RLock())
    with lock:
        yield


class RunThread:
    """The thread of a run: what keeps state between the evaluations of one refuses calls from another's.

    >>> thread = RunThread()
    >>> thread.begin()
    >>> thread.is_own()
    True
    """

    def __init__(self) -> None:
        self._owner: int | None = None  # None between runs

    def begin(self) -> None:
        """A run of this thread begins; raises RuntimeError while that of another goes on."""
        with _adding:
            self.check()
            self._owner = get_ident()

    def is_own(self) -> bool:
        """Whether no run of another thread goes on."""
        return self._owner in (None, get_ident())

    def check(self) -> None:
        """Raises RuntimeError while a run of another thread goes on."""
        if not self.is_own():
            raise RuntimeError(
                "another thread is generating with this model or accelerator: `generate_latents` and `TextToAudio` let "
                "threads take turns; give each thread a model and an accelerator of its own, or hold "
                "`foley.core.locks.sole_user(denoiser)` around each generation"
            )

    def end(self) -> None:
        """The run has ended."""
        self._owner = None
