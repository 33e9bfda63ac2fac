"""Named tensors in a safetensors file beside a JSON file that describes them and carries their hash."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from foley.files import write_json, write_tensors
from foley.hashing import hash_file


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
        ValueError: the tensors are not those that the JSON was written for.
    """
    info: dict[str, Any] = json.loads(info_path(stem).read_text(encoding="utf-8"))
    expected, actual = info.pop("tensors_sha256", None), hash_file(tensor_path(stem))
    if actual != expected:
        raise ValueError(
            f"{tensor_path(stem)} has SHA-256 {actual}, but {info_path(stem).name} was written for {expected}: "
            "the two files do not belong together; make them again"
        )
    return load_file(tensor_path(stem)), info
