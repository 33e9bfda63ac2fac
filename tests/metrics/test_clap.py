"""CLAP on a tiny random model that takes the same path as the published one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from published_keys import constant_state, laion_clap
from tiny_clap import save_clap
from transformers import ClapFeatureExtractor

from foley.core.components import CheckpointError
from foley.metrics.extractors.clap import ClapEmbedder, ClapSpectrogram, split_windows

RATE_HZ = 48000


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(round(seconds * RATE_HZ), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[False, True], ids=["unfused", "fused"])
def embedder(request, tmp_path_factory: pytest.TempPathFactory) -> ClapEmbedder:
    return ClapEmbedder.from_pretrained(save_clap(tmp_path_factory.mktemp("clap"), fusion=request.param))


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(embedder: ClapEmbedder) -> None:
    clips = [noise(1, 1), noise(10, 2), noise(12, 3)]
    audio, text = embedder.audio(clips), embedder.text(["a dog barks", "rain"])
    assert (audio.shape, text.shape) == ((3, embedder.dim), (2, embedder.dim))
    torch.testing.assert_close(audio.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    for index, clip in enumerate(clips):
        torch.testing.assert_close(embedder.audio([clip.numpy()])[0], audio[index], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedder.text(["rain"])[0], text[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("fusion", "truncation"), [(False, "rand_trunc"), (True, "fusion")])
def test_preprocessing_equals_that_of_transformers(fusion: bool, truncation: str) -> None:
    theirs = ClapFeatureExtractor(truncation=truncation, frequency_min=50)
    clip = noise(4)
    expected = theirs(clip.numpy().astype(np.float64), sampling_rate=RATE_HZ, return_tensors="pt")["input_features"]
    own = ClapSpectrogram(RATE_HZ, fusion)(split_windows(clip, 10 * RATE_HZ))
    torch.testing.assert_close(own[0], expected[0, 0].float(), atol=2e-2, rtol=1e-3)


def test_windows_cover_a_long_clip_and_repeat_a_short_one() -> None:
    assert split_windows(torch.arange(25), 10)[:, 0].tolist() == [0, 10, 15]
    assert split_windows(torch.arange(20), 10)[:, 0].tolist() == [0, 10]
    assert split_windows(torch.tensor([1, 2, 3, 4]), 10).tolist() == [[1, 2, 3, 4, 1, 2, 3, 4, 0, 0]]


def test_absent_files_fail_at_once_and_name_the_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing' cannot be loaded.*huggingface\.co/laion/clap-htsat-unfused"):
        ClapEmbedder.from_pretrained(tmp_path / "nothing")


def test_checkpoints_of_laion_clap_load_strictly(tmp_path: Path) -> None:
    folder = save_clap(tmp_path / "clap")
    vocabulary = len(ClapEmbedder.from_pretrained(folder).tokenizer)
    state = constant_state(laion_clap(8, 16, 12, vocabulary, 40))
    qkv = "audio_branch.layers.2.blocks.0.attn.qkv.bias"
    state[qkv] = torch.arange(96.0)
    checkpoint = {"epoch": 1, "loss": np.float64(0.5), "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(checkpoint, tmp_path / "laion.pt")
    own = ClapEmbedder.from_pretrained(folder, checkpoint=tmp_path / "laion.pt").model.state_dict()
    attention = "audio_model.audio_encoder.layers.2.blocks.0.attention.self"
    assert own[f"{attention}.key.bias"].tolist() == list(range(32, 64))
    torch.testing.assert_close(own["text_projection.linear2.bias"], state["text_projection.2.bias"].clone())
    checkpoint["state_dict"].pop("module.text_branch.pooler.dense.bias")
    torch.save(checkpoint, tmp_path / "laion.pt")
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: text_model\.pooler\.dense\.bias"):
        ClapEmbedder.from_pretrained(folder, checkpoint=tmp_path / "laion.pt")
