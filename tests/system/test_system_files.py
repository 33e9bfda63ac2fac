"""A system's folder: nothing of it can be changed, swapped or lost without a word (row 27 of the reliability table)."""

import json
import logging
import os
import random
import shutil

import pytest
import torch
from small_system import CONFIGS

from foley.core.components import CheckpointError, load_component
from foley.core.config import PROJECT_ROOT
from foley.core.reading import DamagedFileError
from foley.system.system import build_system, codec_hashes, load_system, save_system, share_parts


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("exported") / "system"
    save_system(build_system(CONFIGS), directory)
    return directory


@pytest.fixture
def directory(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "system")


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def older(directory, **changes):
    """The same system as version 0.1 described it."""
    file = directory / "system.json"
    info = json.loads(file.read_text())
    files = info.pop("files_sha256")
    del info["sha256"]
    weights = {name.split("/")[0]: digest for name, digest in files.items() if name.endswith("model.safetensors")}
    file.write_text(json.dumps({**info, "format": "foley-system/1", "weights_sha256": weights, **changes}))


def test_an_exported_system_loads(directory):
    assert load_system(directory).configs["codec"]["sample_rate_hz"] == 2000
    assert set(json.loads((directory / "system.json").read_text())["files_sha256"]) == {
        *(f"{name}/{file}" for name in CONFIGS if name != "process" for file in ("config.json", "model.safetensors")),
        "text/audiocaps.json",
    }


@pytest.mark.parametrize("name", ["codec", "denoiser", "text", "normaliser"])
def test_a_changed_config_is_refused(directory, name):
    edit(directory / name / "config.json", sample_rate_hz=4000)
    with pytest.raises(CheckpointError, match=rf"{name}/config.json is missing or is not the file"):
        load_system(directory)


def test_a_changed_vocabulary_is_refused(directory):
    (directory / "text" / "audiocaps.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"text/audiocaps\.json"):
        load_system(directory)


@pytest.mark.parametrize(
    "changes", [{"process": {**CONFIGS["process"], "prediction": "epsilon"}}, {"files_sha256": {}}]
)
def test_a_changed_description_is_refused(directory, changes):
    edit(directory / "system.json", **changes)
    with pytest.raises(CheckpointError, match=r"system\.json was changed after its export"):
        load_system(directory)


def test_an_older_system_loads_with_a_warning_and_its_weights_must_have_hashes(directory, caplog):
    older(directory)
    with caplog.at_level(logging.WARNING):
        load_system(directory)
    assert "no hash binds its configs" in caplog.text
    older_info = json.loads((directory / "system.json").read_text())
    edit(directory / "system.json", weights_sha256={})
    with pytest.raises(CheckpointError, match=r"holds no SHA-256 of .*denoiser/model\.safetensors"):
        load_system(directory)
    for name in older_info["weights_sha256"]:
        (directory / name / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"denoiser/model\.safetensors does not exist: denoiser would be untrained"
    ):
        load_system(directory)


def test_files_beside_the_described_ones_are_not_taken_for_captions(directory):
    (directory / "captions.txt").write_text("a dog barks\n")
    with pytest.raises(CheckpointError, match=r"no SHA-256 of .*captions\.txt"):
        load_system(directory)


def test_shared_parts_are_bound_too(directory, tmp_path):
    student = shutil.copytree(directory, tmp_path / "student")
    edit(student / "system.json", note="another")
    assert share_parts(student, directory) == ["denoiser", "text", "codec", "normaliser"]
    assert load_system(student).configs["codec"] == load_system(directory).configs["codec"]
    edit(directory / "codec" / "config.json", sample_rate_hz=4000)
    with pytest.raises(CheckpointError, match=r"codec/config\.json"):
        load_system(student)


def test_an_export_copies_no_file_that_a_strangers_config_names(directory, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    system = build_system(CONFIGS)
    system.configs["denoiser"]["note"] = str(secret)
    try:
        save_system(system, tmp_path / "again")
    finally:
        del CONFIGS["denoiser"]["note"]
    assert "secret" not in {file.name for file in (tmp_path / "again").rglob("*")}
    assert (tmp_path / "again/text/audiocaps.json").is_file()


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "no UTF-8": lambda content: b"\xff\xfe" + content,
    "deep": lambda content: b"[" * 100_000,
    "a list": lambda content: b"[]",
    "nothing in it": lambda content: b"{}",
    "huge header": lambda content: b"\xff" * 8 + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["system.json", "codec/config.json", "codec/model.safetensors", "text/audiocaps.json"])
def test_a_damaged_file_is_named(directory, name, damage):
    file = directory / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises((CheckpointError, DamagedFileError), match=file.name):
        load_system(directory)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_component_is_named(directory, name, damage):
    file = directory / "codec" / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises((CheckpointError, DamagedFileError), match=name.replace(".", r"\.")):
        load_component(directory / "codec")


def test_flipped_bytes_are_found(directory):
    rng = random.Random(0)
    for file in [file for file in directory.rglob("*") if file.is_file()]:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        original = file.read_bytes()
        file.write_bytes(content)
        try:
            with pytest.raises((CheckpointError, DamagedFileError), match=file.name):
                load_system(directory)
        finally:
            file.write_bytes(original)
    load_system(directory)


def test_what_ships_is_bound_by_hashes():
    for system in (PROJECT_ROOT / "data/demo", PROJECT_ROOT / "data/demo/student"):
        info = json.loads((system / "system.json").read_text())
        assert info["format"] == "foley-system/2"
        assert "codec/config.json" in info["files_sha256"]
    assert info["codec_hash"] in codec_hashes(os.fspath(PROJECT_ROOT / "data/demo"))
