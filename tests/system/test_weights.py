"""Weights are given in the same ways everywhere: a checkpoint, a folder of a run, system or component, or a name."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from small_system import CONFIGS, training_checkpoint

from foley.core import pipelines
from foley.core.components import CheckpointError, filled, save_component
from foley.core.config import PROJECT_ROOT, published_config
from foley.core.hashing import hash_module
from foley.core.hub import Hub
from foley.system import checkpoint as checkpoints
from foley.system.checkpoint import load_trained, locate_source, noted_source, trained_config
from foley.system.system import build_system, codec_hashes, load_system, read_weights, save_system
from foley.training.distillation import Teacher

KINDS = ("run", "run/checkpoints", "run/checkpoints/last.ckpt", "system")


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    return build_system(CONFIGS)


@pytest.fixture(scope="module")
def folder(system, tmp_path_factory):
    """One system as a run, as an exported folder, and as the folders of its components."""
    folder = tmp_path_factory.mktemp("weights")
    checkpoint = training_checkpoint(system, folder, hash_module(system.modules["codec"]))
    (folder / "run/checkpoints").mkdir(parents=True)
    shutil.move(checkpoint, folder / "run/checkpoints/last.ckpt")
    save_system(system, folder / "system")
    return folder


@pytest.mark.parametrize("kind", [*KINDS, "system/denoiser", "system/denoiser/model.safetensors"])
def test_a_component_is_loaded_from_each(system, folder, kind):
    for source in (folder / kind, str(folder / kind)):
        assert hash_module(load_trained(source, "denoiser")) == hash_module(system.modules["denoiser"])
    assert trained_config(folder / kind, "denoiser") == CONFIGS["denoiser"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_is_loaded_from_each(system, folder, kind):
    loaded = load_system(str(folder / kind))
    assert {name: hash_module(module) for name, module in loaded.modules.items()} == {
        name: hash_module(module) for name, module in system.modules.items()
    }
    assert codec_hashes(folder / kind) == {hash_module(system.modules["codec"])}
    assert hash_module(Teacher.load(str(folder / kind)).make_student()) != ""


@pytest.mark.parametrize("kind", [*KINDS, "system/denoiser"])
def test_a_run_starts_from_each(system, folder, kind):
    codec_hash = hash_module(system.modules["codec"])
    saved = read_weights(str(folder / kind), CONFIGS, codec_hash)
    state = filled(saved["state_dict"], saved["path"])
    for key, value in system.modules["denoiser"].state_dict().items():
        assert torch.equal(state[f"denoiser.{key}"], value)
    assert saved["foley"]["components"]["denoiser"] == CONFIGS["denoiser"]
    if kind != "system/denoiser":
        assert saved["foley"]["codec_hash"] == codec_hash


def test_latents_of_the_rounded_codec_of_a_system_are_its_own(system, tmp_path):
    save_system(system, tmp_path, torch.float16)
    rounded = hash_module(load_trained(tmp_path, "codec"))
    original = hash_module(system.modules["codec"])
    assert rounded != original
    for codec_hash in (rounded, original):
        assert read_weights(tmp_path, CONFIGS, codec_hash)["foley"]["codec_hash"] == codec_hash
    assert read_weights(tmp_path, CONFIGS, "another")["foley"]["codec_hash"] != "another"


def test_what_is_none_of_these_says_what_was_looked_for(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"names neither a published system .* nor a file or folder that exists"):
        load_trained("absent", "codec")
    with pytest.raises(
        CheckpointError, match=r"none of system\.json, config\.json, checkpoints/last\.ckpt, last\.ckpt"
    ):
        load_trained(tmp_path, "codec")
    with pytest.raises(CheckpointError, match="is a system, which has no 'vocoder', only denoiser, text"):
        load_trained(folder / "system", "vocoder")
    with pytest.raises(CheckpointError, match="holds no component 'vocoder'"):
        load_trained(folder / "run", "vocoder")
    with pytest.raises(CheckpointError, match="is a component, not an exported system"):
        load_system(folder / "system/codec")
    with pytest.raises(CheckpointError, match="which this run does not train: text"):
        read_weights(folder / "system/codec", {"text": CONFIGS["text"]}, None)
    torch.save({"state_dict": {}}, tmp_path / "published.pt")
    with pytest.raises(
        CheckpointError, match=r"a published file is converted first \(scripts/convert_checkpoint\.py\)"
    ):
        load_trained(tmp_path / "published.pt", "codec")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"{}"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    (tmp_path / "last.ckpt").write_bytes(damage)
    with pytest.raises((CheckpointError, ValueError), match=r"last\.ckpt"):
        load_system(tmp_path)


def without_codec(folder, tmp_path, **metadata):
    checkpoint = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    del checkpoint["foley"]["codec_dir"]
    checkpoint["foley"] |= metadata
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_codec_is_given_where_a_checkpoint_names_none(system, folder, tmp_path):
    checkpoint = without_codec(folder, tmp_path)
    with pytest.raises(CheckpointError, match=r"does not say which codec it was trained on .* codec_path=CODEC"):
        load_system(checkpoint)
    for codec in ("system", "system/codec", "codec"):
        loaded = load_system(checkpoint, codec_path=str(folder / codec))
        assert hash_module(loaded.modules["codec"]) == hash_module(system.modules["codec"])
        assert loaded.configs["codec"] == CONFIGS["codec"]


@pytest.mark.parametrize("kind", ["run", "system"])
def test_another_codec_than_that_of_the_latents_is_refused(folder, tmp_path, kind):
    other = build_system(CONFIGS).modules["codec"]
    save_component(other, CONFIGS["codec"], tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"was trained on latents of the codec .* but .*other holds"):
        load_system(folder / kind, codec_path=tmp_path / "other")


def test_a_system_takes_the_codec_that_its_own_is_a_rounded_copy_of(system, folder, tmp_path):
    save_system(system, tmp_path, torch.float16)
    codec = load_system(tmp_path, codec_path=folder / "codec").modules["codec"]
    assert hash_module(codec) == hash_module(system.modules["codec"])


def test_a_codec_that_has_moved_is_asked_for(folder, tmp_path):
    checkpoint = without_codec(folder, tmp_path, codec_dir=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=r"the codec at .*gone, which does not exist; .*codec_path=CODEC"):
        load_system(checkpoint)


def test_a_source_is_noted_so_that_it_is_found_again(folder):
    assert noted_source(PROJECT_ROOT / "data/demo") == "data/demo"
    assert locate_source("data/demo") == PROJECT_ROOT / "data/demo"
    assert noted_source("ezaudio_l") == locate_source("ezaudio_l") == "ezaudio_l"


@pytest.fixture
def published(hub_dir, tiny, tmp_path, monkeypatch):
    """`ezaudio_l` means the small published layout."""
    overrides = OmegaConf.from_dotlist(tiny)
    for module in (checkpoints, pipelines):
        monkeypatch.setattr(module, "published_config", lambda name, given=None: published_config(name, overrides))
    monkeypatch.setattr(checkpoints, "Hub", lambda: Hub(hub_dir))
    monkeypatch.setattr("foley.system.system.Hub", lambda directory=None: Hub(hub_dir))
    monkeypatch.setenv("FOLEY_CACHE", str(tmp_path / "cache"))
    return "ezaudio_l"


def test_a_published_system_is_a_teacher_a_start_and_a_codec(published):
    teacher = Teacher.load(published)
    assert teacher.codec_hashes == {hash_module(load_trained(published, "codec"))}
    json.dumps(teacher.student_configs)  # plain: checkpoints hold nothing else
    teacher.make_student()
    saved = read_weights(published, CONFIGS, None)
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"denoiser", "normaliser"}
    assert trained_config(published, "codec")["_target_"].endswith("WaveformVAE")
    with pytest.raises(CheckpointError, match="is published with its codec"):
        load_system(published, codec_path="anything")
