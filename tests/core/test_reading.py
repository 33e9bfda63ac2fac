"""What a damaged file becomes: one error that names it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foley.core.reading import DamagedFileError, parse_json, read_json, reading


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 10_000, "it holds an integer of 10000 digits"),
        ('{"caption": "a \\ud800 dog"}', "half a surrogate pair"),
        ("", "Expecting value"),
        ('[{"caption": "rain", "id": 1, "caption": "wind"}]', "it names 'caption' twice"),
    ],
)
def test_a_damaged_json_is_named_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "system.json"
    path.write_text(text)
    with pytest.raises(DamagedFileError, match=reason) as caught:
        read_json(path, "the description of a system", "export the system again")
    assert str(caught.value).startswith(f"{path} is damaged or not the description of a system: ")
    assert str(caught.value).endswith("; export the system again")


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'"\xff\xfe"')
    with pytest.raises(DamagedFileError, match=str(path)):
        read_json(path, "JSON")


def test_truncated_tensors_and_a_missing_entry_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(DamagedFileError, match=str(path)), reading(path, "a file of tensors"):
        load_file(path)
    with pytest.raises(DamagedFileError, match="it lacks the entry 'mean'"), reading(path, "a file of tensors"):
        {"std": torch.ones(1)}["mean"]


def test_an_absent_file_stays_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json", "JSON")


def test_a_whole_pair_of_surrogates_is_text() -> None:
    assert parse_json('"\\ud83d\\udc36"', "here") == "🐶"
