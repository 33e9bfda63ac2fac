"""Where files are looked for, and how soon it is clear that they are not to be had."""

import time

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError

from foley.core.components import CheckpointError
from foley.core.hub import Hub
from foley.system.published.ezaudio import load_text

TEXT = {"_target_": "foley.models.text.FrozenT5Conditioner", "name_or_path": "no-one/no-model", "dim": 8}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(params=["offline", "no network"])
def unreachable(request, monkeypatch, empty_cache):
    if request.param == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # Nothing listens on the discard port: the connection is refused, as it is on a machine without a network.
    monkeypatch.setattr("foley.core.hub.hf_hub_url", lambda *names, **options: "http://127.0.0.1:9/file")


@pytest.mark.usefixtures("unreachable")
def test_a_file_that_cannot_be_fetched_fails_at_once_with_the_mend():
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"a/b\.pt of no-one/no-repo is not on this machine") as error:
        Hub().file("no-one/no-repo", "a/b.pt")
    assert time.perf_counter() - start < 20  # the libraries alone would try for a minute
    for part in ("huggingface.co/no-one/no-repo", "hf download", "DIR/no-one/no-repo/a/b.pt", "hub_dir=DIR"):
        assert part in str(error.value)


@pytest.mark.usefixtures("unreachable")
def test_a_text_encoder_that_cannot_be_fetched_fails_with_the_mend():
    with pytest.raises(CheckpointError, match=r"tokenizer.*of no-one/no-model.*DIR/no-one/no-model.*hub_dir=DIR"):
        load_text(Hub(), TEXT)


def test_a_text_encoder_whose_download_breaks_off_is_named(empty_cache, monkeypatch):
    def breaks_off(name, local_files_only, **options):
        raise OSError("no such file") if local_files_only else HTTPError("peer closed connection")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", breaks_off)
    monkeypatch.setattr(Hub, "require_network", lambda *names: None)
    with pytest.raises(CheckpointError, match=r"text encoder no-one/no-model: peer closed connection"):
        load_text(Hub(), TEXT)


@pytest.mark.usefixtures("unreachable")
def test_a_file_in_the_cache_needs_no_network(empty_cache):
    commit = "0" * 40
    folder = empty_cache / "models--owner--repo"
    for name, content in [("refs/main", commit), (f"snapshots/{commit}/a/b.pt", "weights")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    assert Hub().file("owner/repo", "a/b.pt").read_text() == "weights"


def test_a_folder_is_the_only_place_looked_in(tmp_path):
    (tmp_path / "owner/repo").mkdir(parents=True)
    (tmp_path / "owner/repo/a.pt").write_text("weights")
    assert Hub(tmp_path).file("owner/repo", "a.pt") == tmp_path / "owner/repo/a.pt"
    with pytest.raises(CheckpointError, match=r"b\.pt does not exist: hub_dir=.*huggingface\.co/owner/repo"):
        Hub(tmp_path).file("owner/repo", "b.pt")
