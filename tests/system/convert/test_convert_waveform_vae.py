"""The published waveform VAE: parity of outputs, and full coverage of its keys."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from foley.core.components import CheckpointError, load_component, save_component
from foley.system.convert.waveform_vae import codec_config, waveform_vae


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    with safe_open(shared / "golden" / "vae_tiny.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tensors["config"] = json.loads(file.metadata()["config"])
    return tensors


@pytest.fixture(scope="module")
def published(golden: dict) -> dict:
    return {key.removeprefix("weight."): value for key, value in golden.items() if key.startswith("weight.")}


def test_matches_the_published_outputs(golden: dict, published: dict, tmp_path: Path) -> None:
    model = waveform_vae(published, golden["config"])
    assert not model.training
    with torch.no_grad():
        mean, scale = model.encode_moments(golden["in.audio"])
        torch.testing.assert_close(torch.cat([mean, scale], 1), golden["out.encoder"], atol=1e-4, rtol=1e-3)
        decoded = model.decode(mean)
        torch.testing.assert_close(decoded, golden["out.decode_mean"], atol=1e-4, rtol=1e-3)
        save_component(model, codec_config(golden["config"]), tmp_path)
        torch.testing.assert_close(load_component(tmp_path).decode(mean), decoded, atol=0, rtol=0)
        torch.testing.assert_close(model.fold_weight_norm().decode(mean), decoded, atol=1e-5, rtol=1e-4)


def test_covers_the_official_checkpoint(shared: Path) -> None:
    official = json.loads((shared / "golden" / "vae_official_shapes.json").read_text())
    with torch.device("meta"):
        published = {key: torch.empty(shape) for key, shape in official["keys"].items()}
    model = waveform_vae(published, official["config"])  # refuses keys left over on either side
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == official["n_params"] == 43_846_785


def test_refuses_left_over_and_unknown_keys(golden: dict, published: dict) -> None:
    short = {key: value for key, value in published.items() if key != "encoder.layers.0.bias"}
    with pytest.raises(CheckpointError, match=r"encoder\.stem\.bias"):
        waveform_vae(short, golden["config"])
    for foreign in ("encoder.other.bias", "encoder.layers.9.bias", "decoder.layers.1.layers.7.bias", "flat"):
        with pytest.raises(CheckpointError, match=f"unexpected in the checkpoint: {foreign}"):
            waveform_vae({**published, foreign: torch.zeros(1)}, golden["config"])


def test_refuses_other_architectures_and_incomplete_configs(golden: dict, published: dict) -> None:
    with pytest.raises(ValueError, match=r"does not say bottleneck\.type"):
        waveform_vae(published, {key: value for key, value in golden["config"].items() if key != "bottleneck"})
    with pytest.raises(ValueError, match="`io_channels: 2` is not supported"):
        waveform_vae(published, {**golden["config"], "io_channels": 2})
