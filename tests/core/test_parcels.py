"""A folder packed into files of bounded size and taken up elsewhere; an older state never takes a newer one's place."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from foley.core.parcels import LINEAGE_FILE, PARCEL_FILE, pack, take_up
from foley.core.reading import DamagedFileError, read_json

LIMIT = 5000


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A file of more than one part, a link to it, a second name of it, an empty folder."""
    folder = tmp_path / "work"
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "empty").mkdir()
    step = folder / "run/checkpoints/step_000004.ckpt"
    step.write_bytes(np.random.default_rng(0).bytes(3 * LIMIT))
    step.with_name("last.ckpt").symlink_to(step.name)
    os.link(step, step.with_name("best.ckpt"))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = [path for path in sorted(folder.rglob("*")) if path.name != LINEAGE_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def test_what_is_taken_up_is_what_was_packed(work: Path, tmp_path: Path) -> None:
    parcel, elsewhere = tmp_path / "parcel", tmp_path / "elsewhere/work"
    files = pack(work, parcel, LIMIT)
    assert sorted(files) == sorted(parcel.iterdir())
    assert len(files) >= 5
    assert max(file.stat().st_size for file in files) <= LIMIT
    take_up(parcel, elsewhere)
    assert contents(elsewhere) == contents(work)
    assert (elsewhere / "run/checkpoints/last.ckpt").is_symlink()
    assert not list(elsewhere.parent.glob(".*"))


def test_a_folder_goes_on_from_its_parcel_on_any_machine(work: Path, tmp_path: Path) -> None:
    first, second, elsewhere = tmp_path / "first", tmp_path / "second", tmp_path / "elsewhere"
    pack(work, first, LIMIT)
    shutil.copytree(first, tmp_path / "older")
    take_up(first, elsewhere)
    (elsewhere / "more.txt").write_text("trained")
    pack(elsewhere, second, LIMIT)
    for older in (first, second):  # a folder that is newer than the parcel stays as it is
        (elsewhere / "more.txt").write_text("trained on")
        take_up(older, elsewhere)
        assert (elsewhere / "more.txt").read_text() == "trained on"
    take_up(second, tmp_path / "third")
    assert (tmp_path / "third/more.txt").read_text() == "trained"
    take_up(tmp_path / "older", tmp_path / "third")
    assert (tmp_path / "third/more.txt").exists()


def test_a_newer_parcel_does_not_overwrite_what_went_on_from_an_older_one(work: Path, tmp_path: Path) -> None:
    pack(work, tmp_path / "first", LIMIT)
    take_up(tmp_path / "first", tmp_path / "elsewhere")
    pack(tmp_path / "elsewhere", tmp_path / "second", LIMIT)
    before = contents(work)
    with pytest.raises(ValueError, match=r"two pieces of work; move one of them away"):
        take_up(tmp_path / "second", work)
    assert contents(work) == before


def test_a_new_parcel_takes_the_place_of_the_old_one(work: Path, tmp_path: Path) -> None:
    parcel = tmp_path / "parcel"
    old = pack(work, parcel, LIMIT)
    new = pack(work, parcel, LIMIT)
    assert sorted(parcel.iterdir()) == sorted(new)
    assert set(old) & set(new) == {parcel / PARCEL_FILE}


def test_without_a_parcel_there_is_nothing_to_take_up(work: Path, tmp_path: Path) -> None:
    before = contents(work)
    take_up(tmp_path / "none", work)
    take_up(tmp_path / "none", tmp_path / "new")
    assert contents(work) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda part, index: part.unlink(), r"000 does not exist, but .*copy its folder again"),
        (lambda part, index: part.write_bytes(part.read_bytes()[:-1]), r"000 is not the file that .* names"),
        (lambda part, index: index.write_text('{"format": "foley-parcel-1", "id": "a"}'), "lacks the entry 'parts'"),
        (lambda part, index: index.write_text('{"format": "other"}'), "its format is 'other'"),
        (lambda part, index: index.write_text('{"format": "foley-parcel-1", "parts": []}'), "lacks the entry 'id'"),
        (lambda part, index: index.write_text('{"format": "foley-parcel-1", "id": 3, "parts": []}'), "its id is 3"),
        (lambda part, index: index.write_text('{"format": "foley-parcel-1", "id": "a", "parts": []}'), "not a parcel"),
    ],
)
def test_a_damaged_parcel_is_refused_whole(work: Path, tmp_path: Path, damage, words: str) -> None:
    parcel = tmp_path / "parcel"
    index, first, *_ = pack(work, parcel, LIMIT)
    damage(first, index)
    with pytest.raises(DamagedFileError, match=words):
        take_up(parcel, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_parcel_names_files_of_its_folder_alone(work: Path, tmp_path: Path) -> None:
    index, first, *_ = pack(work, tmp_path / "parcel", LIMIT)
    index.write_text(index.read_text().replace(first.name, f"../parcel/{first.name}"))
    with pytest.raises(DamagedFileError, match="is no file of this folder"):
        take_up(tmp_path / "parcel", tmp_path / "elsewhere")
    assert read_json(work / LINEAGE_FILE, "a list") == [read_json(index, "a parcel")["id"]]


def test_what_would_leave_the_folder_is_not_unpacked(work: Path, tmp_path: Path) -> None:
    (work / "outside").symlink_to(tmp_path)
    pack(work, tmp_path / "parcel", LIMIT)
    with pytest.raises(DamagedFileError, match="'outside' is a link to an absolute path; copy its folder again"):
        take_up(tmp_path / "parcel", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_parcel_without_a_byte_in_its_files_does_not_take_the_place_of_a_good_one(work: Path, tmp_path: Path) -> None:
    pack(work, tmp_path / "parcel", LIMIT)
    before = contents(tmp_path / "parcel")
    with pytest.raises(ValueError, match="max_bytes=0: give a whole number >= 1"):
        pack(work, tmp_path / "parcel", 0)
    assert contents(tmp_path / "parcel") == before


def test_a_damaged_lineage_is_said(work: Path, tmp_path: Path) -> None:
    (work / LINEAGE_FILE).write_text("3")
    with pytest.raises(DamagedFileError, match=r"lineage\.json is damaged or not a list of parcels"):
        pack(work, tmp_path / "parcel", LIMIT)
