"""A folder as one archive in numbered files of bounded size: work that goes on in another place, on another day.

`parcel.json` names the files with their hashes, and the parcel by an id. A folder remembers the ids of all parcels that
it came from and was packed into, so that an older state is never taken for a newer one.
"""

import secrets
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from foley.core.files import refusing_full_disk, replacing, write_json
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.core.numbers import COUNT
from foley.core.reading import DamagedFileError, read_json, reading

_log = get_logger(__name__)

PARCEL_FILE = "parcel.json"
"""Written last: without it there is no parcel."""
LINEAGE_FILE = "lineage.json"
"""In a folder: the ids of its parcels."""
FORMAT = "foley-parcel-1"

_WHAT, _MEND = "a parcel", "copy its folder again, whole"


def pack(folder: Path, target: Path, max_bytes: int) -> list[Path]:
    """Pack all of `folder` into files of at most `max_bytes` in `target`, in the place of an older parcel there.

    Whatever interrupts it, `target` holds the old parcel or the new one. Returns the files, `parcel.json` among them.
    Raises ValueError where no byte may be in a file.
    """
    COUNT.check("max_bytes", max_bytes)
    identity = secrets.token_hex(6)
    write_json(folder / LINEAGE_FILE, [*_lineage(folder), identity])
    target.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with refusing_full_disk(target / PARCEL_FILE), TemporaryFile(dir=target) as whole:
        with tarfile.open(mode="w", fileobj=whole) as archive:
            archive.add(folder, arcname="")
        whole.seek(0)
        while content := whole.read(max_bytes):
            files.append(target / f"parcel_{identity}.{len(files):03d}")
            with replacing(files[-1]) as temporary:
                temporary.write_bytes(content)
    parts = [{"name": file.name, "sha256": hash_file(file)} for file in files]
    write_json(target / PARCEL_FILE, {"format": FORMAT, "id": identity, "parts": parts})
    for stale in set(target.glob("parcel_*")) - set(files):
        stale.unlink()
    return [target / PARCEL_FILE, *files]


def take_up(source: Path, folder: Path) -> None:
    """Unpack the parcel in `source` to `folder`, whole or not at all, unless `folder` goes on from it already.

    Without a parcel nothing happens. Raises ValueError where `folder` does not come from it, and DamagedFileError for
    files that are missing or not those of the parcel.
    """
    if not (source / PARCEL_FILE).is_file():
        return
    parcel = _read(source)
    if parcel["id"] in _lineage(folder):
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} does not come from the parcel in {source}, nor that from it: they are two pieces of work; "
            "move one of them away, and the other is gone on with"
        )
    unpacked = folder.with_name(f".{folder.name}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    with refusing_full_disk(folder), TemporaryFile(dir=unpacked.parent) as whole:
        for part in parcel["parts"]:
            whole.write((source / part["name"]).read_bytes())
        whole.seek(0)
        with reading(source / PARCEL_FILE, _WHAT, _MEND), _tar_errors(), tarfile.open(fileobj=whole) as archive:
            archive.extractall(unpacked, filter="data")
    shutil.rmtree(folder, ignore_errors=True)  # empty
    unpacked.rename(folder)
    _log.info("goes on from %s", source)


def _lineage(folder: Path) -> list[str]:
    file = folder / LINEAGE_FILE
    if not file.is_file():
        return []
    with reading(file, "a list of parcels", "remove it"):
        return list(read_json(file, "a list of parcels", "remove it"))


@contextmanager
def _tar_errors() -> Iterator[None]:
    """Those of an archive that is none, or that holds what may not be unpacked, as ValueError."""
    try:
        yield
    except tarfile.TarError as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def _read(source: Path) -> dict[str, Any]:
    """What `parcel.json` says, once all files are those that it names."""
    file = source / PARCEL_FILE
    with reading(file, _WHAT, _MEND):
        parcel: dict[str, Any] = dict(read_json(file, _WHAT, _MEND))
        if parcel["format"] != FORMAT:
            raise ValueError(f"its format is {parcel['format']!r}, not {FORMAT!r}")
        if not isinstance(parcel["id"], str):
            raise ValueError(f"its id is {parcel['id']!r}")
        for part in parcel["parts"]:
            path = source / part["name"]
            if path.name != part["name"]:
                raise ValueError(f"{part['name']!r} is no file of this folder")
            if not path.is_file():
                raise DamagedFileError(f"{path} does not exist, but {file} names it; {_MEND}")
            if hash_file(path) != part["sha256"]:
                raise DamagedFileError(f"{path} is not the file that {file} names; {_MEND}")
    return parcel
