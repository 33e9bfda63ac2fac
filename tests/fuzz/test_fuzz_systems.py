"""Damaged systems and calibrations: what was saved comes back, or one error says which file is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from fuzzing import altered, bounded, damaged, right_or_named
from hypothesis import given
from hypothesis import strategies as st
from small_system import CONFIGS

from foley.core.hashing import hash_module
from foley.system.system import COMPONENTS, SYSTEM_FILE, System, build_system, load_system, save_system


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, System]:
    folder = tmp_path_factory.mktemp("systems") / "small"
    save_system(build_system(CONFIGS), folder)
    return folder, load_system(folder)


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def copied(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def assert_equal(loaded: System | None, original: System, changed: str) -> None:
    """What loads although a file was changed is what was saved; `system.json` itself is bound by nothing."""
    if loaded is None or changed == SYSTEM_FILE:
        return
    for name in COMPONENTS:
        assert hash_module(loaded.modules[name]) == hash_module(original.modules[name])


@bounded
@given(st.data())
def test_a_damaged_file_is_named_or_changes_nothing(
    saved: tuple[Path, System], tmp_path: Path, data: st.DataObject
) -> None:
    folder, original = saved
    copy, name = copied(folder, tmp_path), data.draw(st.sampled_from(files_in(folder)))
    (copy / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    assert_equal(right_or_named(lambda: load_system(copy), str(copy)), original, name)


@bounded
@given(st.data())
def test_an_altered_config_is_refused_by_its_file(
    saved: tuple[Path, System], tmp_path: Path, data: st.DataObject
) -> None:
    folder, original = saved
    name = data.draw(st.sampled_from([name for name in files_in(folder) if name.endswith(".json")]))
    config = json.loads((folder / name).read_text())
    changed = data.draw(altered(config).filter(lambda value: value != config))
    copy = copied(folder, tmp_path)
    (copy / name).write_text(json.dumps(changed))
    loaded = right_or_named(lambda: load_system(copy), str(copy))
    assert loaded is None or name == SYSTEM_FILE
    assert_equal(loaded, original, name)


@bounded
@given(st.data())
def test_a_missing_file_is_named(saved: tuple[Path, System], tmp_path: Path, data: st.DataObject) -> None:
    folder, _ = saved
    copy, name = copied(folder, tmp_path), data.draw(st.sampled_from(files_in(folder)))
    (copy / name).unlink()
    assert right_or_named(lambda: load_system(copy), str(copy)) is None
