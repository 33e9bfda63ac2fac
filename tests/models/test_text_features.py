"""Precomputed features in the place of a text encoder."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foley.core.components import load_component, save_component
from foley.models.text import FeatureConditioner, FeatureError

CONFIG = {"_target_": "foley.models.text.FeatureConditioner", "feature_dim": 5, "dim": 8, "max_length": 6}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name, length in {"short": 2, "clips/long": 4}.items():
        save_file({"features": torch.randn(length, 5)}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def conditioner(directory: Path) -> FeatureConditioner:
    torch.manual_seed(0)
    return FeatureConditioner(5, 8, 6, str(directory))


def test_clips_are_found_by_id_by_path_or_as_a_file(conditioner: FeatureConditioner, directory: Path) -> None:
    embedding = conditioner(["short", "clips/long", "clips/long.wav", str(directory / "short.safetensors"), ""])
    assert embedding.embeddings.shape == (5, 4, 8)
    assert embedding.mask.sum(dim=1).tolist() == [2, 4, 4, 2, 1]
    assert torch.equal(embedding.embeddings[1], embedding.embeddings[2])
    assert torch.equal(embedding.embeddings[0], embedding.embeddings[3])
    assert not embedding.embeddings[~embedding.mask].any()
    assert torch.equal(embedding.embeddings[4, :1], conditioner.empty_embedding)


def test_order_in_time_matters_and_everything_trains(conditioner: FeatureConditioner, directory: Path) -> None:
    save_file({"features": torch.ones(2, 5)}, directory / "constant.safetensors")
    first, second = conditioner(["constant"]).embeddings[0]
    assert not torch.allclose(first, second)
    conditioner(["clips/long", ""]).embeddings.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in conditioner.parameters())


def test_the_rest_of_long_features_is_dropped_with_a_warning(
    conditioner: FeatureConditioner, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"anything": torch.randn(9, 5)}, directory / "endless.safetensors")
    with caplog.at_level(logging.WARNING):
        assert conditioner(["endless"]).mask.sum() == 6
    assert "only the first 6" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"features": torch.zeros(3, 4)}, r"must hold `features` of shape \[S, 5\], it holds {'features': \(3, 4\)}"),
        ({"features": torch.zeros(0, 5)}, "must hold"),
        ({"a": torch.zeros(3, 5), "b": torch.zeros(3, 5)}, "must hold `features`"),
        ({"features": torch.full((3, 5), torch.nan)}, "features that are not finite"),
    ],
)
def test_other_files_are_refused(conditioner, directory, tensors, message) -> None:
    save_file(tensors, directory / "wrong.safetensors")
    with pytest.raises(FeatureError, match=message):
        conditioner(["wrong"])


def test_absent_damaged_and_foreign_files_are_refused(conditioner: FeatureConditioner, directory: Path) -> None:
    with pytest.raises(FeatureError, match="holds no features of 'a dog barks'"):
        conditioner(["a dog barks"])
    save_file({"features": torch.randn(2, 5)}, directory.parent / "outside.safetensors")
    with pytest.raises(FeatureError, match=r"holds no features of '\.\./outside'"):
        conditioner(["../outside"])
    (directory / "damaged.safetensors").write_bytes(b"no tensors")
    with pytest.raises(FeatureError, match="cannot be read as safetensors"):
        conditioner(["damaged"])
    with pytest.raises(FeatureError, match="no directory of features"):
        FeatureConditioner(5, 8, 6)(["short"])
    with pytest.raises(FeatureError, match="cannot be read"):
        FeatureConditioner(5, 8, 6)(["absent.safetensors"])


def test_a_saved_conditioner_needs_no_directory_for_files(conditioner: FeatureConditioner, directory: Path) -> None:
    save_component(conditioner, CONFIG, directory / "component")
    loaded = load_component(directory / "component")
    file = str(directory / "short.safetensors")
    assert torch.equal(loaded([file]).embeddings, conditioner([file]).embeddings)
