"""Files that are whole or absent: each is written beside its place and renamed into it.

Text, JSON, JSON Lines and tensors; tensors beside a JSON that describes them and carries their hash (`save_record`);
and names for files of generated things: safe on every file system, unique, and still readable.
"""

import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foley.core.hashing import hash_file
from foley.core.reading import read_json, reading

_MAX_SLUG_CHARACTERS = 48

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64"})
"""Names of files that are looked for in folders of audio; what is in them decides how they are read."""

WriteRow = Callable[[Mapping[str, Any]], None]
"""Appends a row to a JSON Lines file."""


class DiskFullError(OSError):
    """There is no room for a file; the message names it and says what is free."""


@contextmanager
def refusing_full_disk(path: Path) -> Iterator[None]:
    """A block that writes `path`: a full disk, which each library reports in its own way, becomes a DiskFullError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if "No space left on device" not in str(error):
            raise
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free / 1e6
        raise DiskFullError(
            f"No space left on the disk of {path.parent} for {path.name}: {free:,.1f} MB are free; "
            "make room, or give another folder"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, flushed to disk and renamed into place where the block ends without an error.

    A reader sees the old file or the new one, never a part; on any error the temporary file is removed.
    Raises DiskFullError where there is no room for it.
    """
    with refusing_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a file that then takes the place of `path`, see `replacing`."""
    with replacing(path) as temporary:
        write(temporary)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomic_write(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors`, no two of which may share memory, as safetensors, atomically; `metadata` is of its header."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda temporary: save_file(contiguous, temporary, metadata))


def rounded_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix or kernel `[R, ...]` as bytes, and what one of them is worth in each row, `[R]`.

    >>> levels, scales = rounded_rows(torch.tensor([[127.0, -1.4], [254.0, 100.0]]))
    >>> levels.tolist(), scales.tolist()
    ([[127, -1], [127, 50]], [1.0, 2.0])
    """
    rows = tensor.float().flatten(1)
    scales = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # a row may be zero
    return (rows / scales[:, None]).round().to(torch.int8).view(tensor.shape), scales


def read_tensors(path: Path, what: str = "a safetensors file", mend: str = "make it anew") -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory; raises DamagedFileError and FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {what} is expected there; {mend}")
    with reading(path, what, mend):
        return load_file(path)


@contextmanager
def json_lines(path: Path) -> Iterator[WriteRow]:
    """What appends a row to a file that takes the place of `path` where the block ends without an error.

    Characters that UTF-8 cannot hold (halves of surrogate pairs, in some captions) become question marks.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as stream:

        def write(row: Mapping[str, Any]) -> None:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


def tensor_path(stem: Path) -> Path:
    """`<stem>.safetensors`; appended, since a stem may hold a dot of its own."""
    return stem.with_name(stem.name + ".safetensors")


def info_path(stem: Path) -> Path:
    """`<stem>.json`."""
    return stem.with_name(stem.name + ".json")


def save_record(stem: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write `tensors` and `info`; the JSON comes last and holds the hash of the tensors it belongs to."""
    write_tensors(tensor_path(stem), tensors)
    write_json(info_path(stem), {**info, "tensors_sha256": hash_file(tensor_path(stem))})


def load_record(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_record` wrote.

    Raises:
        FileNotFoundError: one of the two files is absent.
        ValueError: the tensors are not those that the JSON was written for, or one of the two is damaged.
    """
    with reading(info_path(stem), "a description of tensors"):
        info: dict[str, Any] = dict(read_json(info_path(stem), "a description of tensors"))
    expected, actual = info.pop("tensors_sha256", None), hash_file(tensor_path(stem))
    if actual != expected:
        raise ValueError(
            f"{tensor_path(stem)} has SHA-256 {actual}, but {info_path(stem).name} was written for {expected}: "
            "the two files do not belong together; make them again"
        )
    return read_tensors(tensor_path(stem)), info


def drop_from_cache(folder: Path) -> bool:
    """Have the files below `folder` read from the disk again, as if nobody had; False where the system cannot."""
    if not hasattr(os, "posix_fadvise"):  # not on macOS
        return False
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    return True


def slug(text: str) -> str:
    """Lower-case ASCII letters, digits and single hyphens out of `text`; "sound" where nothing is left.

    >>> slug("A dog barks, twice!")
    'a-dog-barks-twice'
    """
    ascii_text = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text)[:_MAX_SLUG_CHARACTERS].strip("-") or "sound"


def sample_stem(prompt: str, index: int, seed: int) -> str:
    """The name, without extension, of item `index` of a run; unique because the index is."""
    return f"{index:03d}_{slug(prompt)}_seed{seed}"


def one_line(text: str) -> str:
    """`text` with every run of white space and unprintable characters as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
