"""Work in shards: a part of its items each, the same whoever does it, and notes of which shards are done."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from numpy.typing import NDArray

from foley.core.files import write_json
from foley.core.hashing import hash_json
from foley.core.numbers import COUNT, NumberRange
from foley.core.ranges import filesystem_of, publish

NOTES_FOLDER = ".shards"
"""Of an output folder; nothing that reads such a folder looks into it."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a work, by its number from 0 on; the default is all of it.

    A shard has every `count`-th item, or the items whose hash is its number modulo `count`: that does not depend on
    what is done, or on what else is running. Raises ValueError for a number that there is not.

    >>> Shard(1, 3).of([10, 11, 12, 13, 14, 15, 16])
    [11, 14]
    >>> Shard(1, 3).split(rank=1, ranks=2).of([10, 11, 12, 13, 14, 15, 16])
    [14]
    """

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        COUNT.check("shards", self.count)
        NumberRange(least=0, most=self.count - 1, whole=True).check("shard", self.number)

    @overload
    def of(self, items: NDArray[Any]) -> NDArray[Any]: ...
    @overload
    def of(self, items: Sequence[Item]) -> Sequence[Item]: ...
    def of(self, items: Any) -> Any:
        """Its items."""
        return items[self.number :: self.count]

    def split(self, rank: int, ranks: int) -> "Shard":
        """The part of it that one of `ranks` processes does."""
        return Shard(self.number + rank * self.count, self.count * ranks)

    def writer_folder(self, directory: Path) -> Path:
        """Whose lock its writer holds, while others write beside it into `directory`."""
        return directory if self.count == 1 else directory / NOTES_FOLDER / f"writer-{self.number:05d}"


ALL = Shard()
"""The only shard of a work that is not shared out."""


class ShardNotes:
    """Which shards of a request are done, in `.shards/HASH` of the output, a folder or any fsspec URL.

    Args:
        request: plain data, all that the work depends on; another one knows nothing of these notes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     notes = ShardNotes(folder, {"seed": 0}, 3)
    ...     notes.add(1)
    ...     notes.done(), ShardNotes(folder, {"seed": 1}, 3).done()
    ({1}, set())
    """

    def __init__(self, output: str, request: Any, count: int) -> None:
        self.url = f"{output.rstrip('/')}/{NOTES_FOLDER}/{hash_json([request, count])[:16]}"
        self.count = count

    def add(self, number: int) -> None:
        """Note that a shard is done."""
        facts = {"shard": number, "shards": self.count}
        publish(self.url, f"{number:05d}.json", lambda path: write_json(path, facts))

    def done(self) -> set[int]:
        """The shards that are."""
        filesystem, root = filesystem_of(self.url, os.getpid())
        filesystem.invalidate_cache()  # others write there too
        files = [Path(str(name)) for name in filesystem.find(root)]  # no glob: a folder may be called [a]
        return {int(file.stem) for file in files if file.suffix == ".json" and file.stem.isdigit()}

    @property
    def are_complete(self) -> bool:
        """Whether every shard is done."""
        return self.done() == set(range(self.count))

    def clear(self) -> None:
        """Forget them, where all is merged: the next run looks for itself what there is to do."""
        filesystem, root = filesystem_of(self.url, os.getpid())
        if filesystem.exists(root):
            filesystem.rm(root, recursive=True)
