"""LAION-CLAP by its own package beside the port, on the same random weights; no network is asked."""

import socket
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from laion_clap_parts import port_config, save_laion_clap
from transformers import ClapModel

from foley.core.components import CheckpointError
from foley.data.clap_filter import ClapScorer
from foley.metrics.extractors import laion_clap
from foley.metrics.extractors.clap import ClapEmbedder, load_embedder, load_laion_clap
from foley.metrics.protocols import clap

CAPTIONS = ["a dog barks", "rain falls on a metal roof", "siren"]


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(round(seconds * 48000), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def offline():
    def refuse(*_):
        raise AssertionError("a network is asked")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """The unfused checkpoint, and the folder of its tokenizer."""
    return save_laion_clap(tmp_path_factory.mktemp("laion"))


def by_package(path: Path, tokenizer: Path) -> ClapEmbedder:
    return load_embedder("laion_clap", name_or_path=tokenizer, checkpoint=path)


def by_port(path: Path, like: ClapEmbedder, fusion: bool) -> ClapEmbedder:
    model = ClapModel(port_config(like.model.text_branch.config.vocab_size, fusion, epsilon=1e-5))
    load_laion_clap(model, path)
    return ClapEmbedder(model, like.tokenizer)


@pytest.mark.slow
def test_the_package_and_the_port_embed_alike(files):
    own = by_package(*files)
    other = by_port(files[0], own, fusion=False)
    torch.testing.assert_close(own.audio([noise(3)]), other.audio([noise(3)]), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.text(CAPTIONS), other.text(CAPTIONS), atol=1e-5, rtol=0)
    assert own.dim == other.dim
    torch.testing.assert_close(own.text(["siren " * 75]), own.text(["siren " * 90]))  # of 77 tokens, two are its own
    assert "laion_clap" not in sys.modules  # whose import asks the hub for tokenizers


@pytest.mark.slow
def test_models_that_fuse_embed_alike_too(tmp_path):
    path, tokenizer = save_laion_clap(tmp_path, fusion=True)
    own = by_package(path, tokenizer)
    clips = [noise(3, 1), noise(11, 2)]
    torch.testing.assert_close(own.audio(clips), by_port(path, own, fusion=True).audio(clips), atol=1e-5, rtol=0)
    assert (own.audio(clips).diff(dim=0)).abs().max() > 1e-4  # they are heard


@pytest.mark.slow
def test_protocol_and_filter_score_by_the_package(files, tmp_path):
    path, tokenizer = files
    (protocol,) = clap(str(tokenizer), checkpoint=str(path), backend="laion_clap")
    assert protocol.describe()["extractor"] == "LaionClapExtractor"
    soundfile.write(tmp_path / "a.wav", noise(3).numpy(), 48000, subtype="FLOAT")
    window = protocol.preprocessing(noise(3)[None], 48000)
    cosine = protocol.extractor(window[None]).features @ protocol.extractor.text(["a dog barks"]).T
    options = {"name_or_path": tokenizer, "checkpoint": str(path)}
    scorer = ClapScorer(
        lambda device: load_embedder("laion_clap", device=device, **options),
        str(tmp_path),
        "clap",
        backend="laion_clap",
        checkpoint=str(path),
    )
    scorer.start(1, torch.device("cpu"))
    score = scorer.annotate([{"path": "a.wav", "caption": "a dog barks"}])[0]["clap_score"]
    assert score == pytest.approx(cosine.item(), abs=1e-5)
    assert {"backend", "checkpoint"} <= set(scorer.identity)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="backend=openclap: CLAP is loaded by one of transformers, laion_clap"):
        load_embedder("openclap")
    with pytest.raises(CheckpointError, match=r"630k-audioset-best\.pt .*give checkpoint=FILE"):
        clap(backend="laion_clap")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt is no checkpoint of laion_clap.*patch_embed"):
        load_embedder("laion_clap", checkpoint=tmp_path / "other.pt")
    monkeypatch.delitem(sys.modules, "clap_module", raising=False)
    monkeypatch.setattr(laion_clap, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"wants the package laion-clap: pip install 'foley\[eval\]'"):
        laion_clap.import_clap_module()


def test_scores_of_another_backend_or_file_are_others(tmp_path):
    plain = ClapScorer(lambda device: None, str(tmp_path), "clap").identity
    assert not {"backend", "checkpoint"} & set(plain)  # as earlier folders have it
    identities = []
    for content in (b"one", b"two"):
        (tmp_path / "laion.pt").write_bytes(content)
        scorer = ClapScorer(lambda device: None, str(tmp_path), "clap", checkpoint=str(tmp_path / "laion.pt"))
        identities.append(scorer.identity["checkpoint"])
    assert len(set(identities)) == 2
