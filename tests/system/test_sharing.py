"""Systems on the hub, which here is a small one of this machine: pushed, pulled, opened, and refused."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import run_command
from fake_hub import serving_hub
from huggingface_hub import ModelCard, constants
from omegaconf import OmegaConf
from small_system import CONFIGS

from foley.cli.sampling import chosen_system
from foley.core import pipelines
from foley.core.components import CheckpointError
from foley.core.files import write_json
from foley.core.hashing import hash_module
from foley.core.hub import Hub, HubError
from foley.core.reading import read_json
from foley.generation.pipeline_to_audio import open_generator
from foley.generation.text_to_audio import TextToAudio
from foley.system.checkpoint import fetched
from foley.system.sharing import model_card, pull_system, push_system
from foley.system.system import build_system, load_system, read_weights, save_system, share_parts
from foley.training.distillation import Teacher

STAGE = {"name": "align", "command": "python train.py", "seconds": 5400.0, "machine": "a CPU, 2 threads"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "system"
    system = build_system(CONFIGS)
    save_system(system, folder, torch.float16)
    save_system(system, folder / "student", torch.float16)
    share_parts(folder / "student", folder)
    write_json(folder / "training.json", {"stages": [STAGE]})
    (folder / "ATTRIBUTION.md").write_text("| source | licence | clips |\n|---|---|---:|\n| A | CC0 | 2 |\n")
    (folder / "optimizer.ckpt").write_bytes(b"a pickle")
    (folder / ".token").write_text("secret")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pipelines.asked.cache_clear()
    with serving_hub(monkeypatch, tmp_path) as running:
        yield running
    pipelines.asked.cache_clear()


def stop(hub, monkeypatch):
    """From now on nothing answers."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )


def test_what_is_pushed_comes_back_and_generates_the_same(hub, exported, tmp_path):
    address = push_system(exported, "me/tiny", licence="cc-by-4.0")
    sha, files = hub.files("me/tiny")
    assert address == f"{hub.url}/me/tiny/commit/{sha}"
    assert {"system.json", "student/system.json", "denoiser/model.safetensors", "training.json", "README.md"} <= set(
        files
    )
    assert not {"optimizer.ckpt", ".token"} & set(files)
    assert any(request.endswith("/info/lfs/objects/batch") for request in hub.requests)
    generator = TextToAudio.from_pretrained("me/tiny")
    assert generator.model_hash == TextToAudio.load(exported).model_hash
    ours, theirs = (made.generate(["rain"], 0.2, num_steps=2).audio for made in (TextToAudio.load(exported), generator))
    assert torch.equal(ours, theirs)
    assert TextToAudio.from_pretrained("me/tiny", student=True).model_hash == generator.model_hash
    assert hash_module(load_system("me/tiny").modules["codec"]) == hash_module(load_system(exported).modules["codec"])
    options = OmegaConf.create({"system": "me/tiny", "student": True, "hub_dir": None})
    assert load_system(chosen_system(options)).modules.keys() == load_system(exported).modules.keys()


@pytest.mark.slow
def test_a_generator_pushes_its_own_system(hub, exported):
    generator = TextToAudio.from_pretrained(exported)
    generator.push_to_hub("me/again", licence="mit", private=True)
    assert TextToAudio.from_pretrained("me/again").model_hash == generator.model_hash
    assert "There is no `training.json`" in hub.files("me/again")[1]["README.md"].decode()


def test_the_card_names_training_licence_and_hash(hub, exported):
    push_system(exported, "me/tiny", licence="cc-by-4.0")
    text = hub.files("me/tiny")[1]["README.md"].decode()
    card, digest = ModelCard(text), read_json(exported / "system.json", "a system", "")["sha256"]
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "foley",
        "text-to-audio",
    )
    assert card.data.foley_system_sha256 == digest
    for part in ("1.5 hours", "| align | `python train.py` | 90.0 | a CPU, 2 threads |", "| CC0 | 2 |", digest):
        assert part in text
    assert 'from_pretrained("me/tiny")' in text
    assert "student=true" in text


def test_a_folder_that_has_a_card_keeps_its_text_and_its_licence(exported, tmp_path, caplog):
    own = shutil.copytree(exported, tmp_path / "own")
    (own / "README.md").write_text("---\nlicense: cc0-1.0\nfavourite: 3\n---\n# Mine\n\nMy words.\n")
    card = ModelCard(model_card(own, "me/own"))
    assert (card.data.license, card.data.library_name) == ("cc0-1.0", "foley")
    assert card.text.strip() == "# Mine\n\nMy words."
    (own / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"nothing says the licence of the weights; give licence="):
        model_card(own, "me/own")
    assert ModelCard(model_card(own, "me/own", "mit")).text.strip() == "# Mine"
    assert "was not found" not in caplog.text  # the library's word on a text without a header


def test_without_a_network_what_was_fetched_last_is_taken(hub, exported, monkeypatch):
    push_system(exported, "me/tiny", licence="mit")
    folder = pull_system("me/tiny")
    stop(hub, monkeypatch)
    assert pull_system("me/tiny") == folder
    assert TextToAudio.from_pretrained("me/tiny").model_hash
    with pytest.raises(CheckpointError, match=r"system\.json of me/another is not on this machine"):
        pull_system("me/another")


@pytest.mark.slow
def test_a_new_commit_is_fetched_and_an_old_one_by_its_name(hub, exported, tmp_path):
    push_system(exported, "me/tiny", licence="mit")
    [(first, _)] = hub.repositories["me/tiny"]
    old = load_system(pull_system("me/tiny"))
    torch.manual_seed(5)
    TextToAudio(build_system(CONFIGS)).push_to_hub("me/tiny", licence="mit")
    shutil.rmtree(constants.HF_HUB_CACHE)
    # The student of before refers to parts of another system now.
    with pytest.raises(CheckpointError, match="is not the file that"):
        pull_system("me/tiny")
    assert hash_module(load_system(pull_system("me/tiny", first)).modules["denoiser"]) == hash_module(
        old.modules["denoiser"]
    )


def test_a_commit_is_looked_at_as_it_was(hub, exported):
    first = hub.commit("me/both", {"model_index.json": b"{}", "unet/config.json": b"{}"})
    push_system(exported, "me/both", licence="mit")
    assert (Path(fetched("me/both", revision=first)) / "model_index.json").is_file()  # it was a pipeline then
    assert (Path(fetched("me/both")) / "system.json").is_file()


def test_pulled_into_a_folder_of_its_own(hub, exported, tmp_path):
    push_system(exported, "me/tiny", licence="mit")
    run_command("script/pull_system", "repository=me/tiny", f"output_dir={tmp_path}/here")
    assert load_system(tmp_path / "here")
    assert not any(file.is_symlink() for file in (tmp_path / "here").rglob("*"))
    with pytest.raises(FileExistsError, match="here exists already; give a new folder"):
        pull_system("me/tiny", output_dir=tmp_path / "here")
    with pytest.raises(FileExistsError, match="here exists already"):
        pull_system("me/another", output_dir=tmp_path / "here")  # before anything is asked for
    with pytest.raises(CheckpointError, match=r"holds the system \w{64}, not abc"):
        pull_system("me/tiny", sha256="abc")


def test_what_was_altered_on_the_way_is_refused(hub, exported):
    push_system(exported, "me/tiny", licence="mit")
    hub.commit("me/tiny", {"codec/config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"codec/config\.json is missing or is not the file that"):
        pull_system("me/tiny")


def test_what_the_hub_refuses_says_how_to_log_in(hub, exported):
    hub.refuses_writing = True
    with pytest.raises(HubError, match=r"me/tiny could not be written on the hub .*hf auth login.*HF_TOKEN"):
        push_system(exported, "me/tiny", licence="mit")


def test_what_cannot_be_shared_is_not_begun(hub, exported, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"refers to .* outside of .*export the system again without share_with="):
        push_system(exported / "student", "me/tiny", licence="mit")
    with pytest.raises(CheckpointError, match=r"system\.json does not exist.*foley export"):
        push_system(tmp_path, "me/tiny", licence="mit")
    with pytest.raises(ValueError, match="repository=tiny: give OWNER/NAME"):
        push_system(exported, "tiny", licence="mit")
    monkeypatch.setenv("FOLEY_HUB_DIR", str(tmp_path))
    with pytest.raises(HubError, match="stands for the hub, and takes nothing"):
        push_system(exported, "me/tiny", licence="mit")
    assert hub.requests == []


def test_a_folder_laid_out_as_the_hub_is_serves(exported, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "me/tiny")
    assert pull_system("me/tiny", hub_dir=tmp_path) == tmp_path / "me/tiny"
    digest = TextToAudio.load(exported).model_hash
    assert TextToAudio.from_pretrained("me/tiny", hub_dir=tmp_path).model_hash == digest
    assert open_generator("me/tiny", hub_dir=tmp_path).model_hash == digest
    monkeypatch.setenv("FOLEY_HUB_DIR", str(tmp_path))
    assert TextToAudio.load("me/tiny").model_hash == digest
    assert hash_module(Teacher.load("me/tiny").system.modules["denoiser"]) == digest
    assert read_weights("me/tiny", CONFIGS, None)["state_dict"]
    with pytest.raises(CheckpointError, match=r"hub_dir=.* must hold system\.json of"):
        Hub(tmp_path).folder("me/none", ["*"], "system.json")


@pytest.mark.slow
def test_the_verb_pushes(hub, exported):
    run_command("script/push_system", f"system={exported}", "repository=me/tiny", "licence=mit")
    assert "system.json" in hub.files("me/tiny")[1]
