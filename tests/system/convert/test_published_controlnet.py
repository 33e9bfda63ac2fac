"""The published ControlNet's layout: every key finds its place, in the published shapes and in small."""

import json
from pathlib import Path

import pytest
import torch
from published_controlnet import CONTROL, controlnet_weights
from published_files import DENOISER, read_published

from foley.core.components import CheckpointError, load_component
from foley.nn.rotary import inverse_frequencies
from foley.system.convert import convert_checkpoint, ezaudio_controlnet, read_model_config
from foley.system.convert.ezaudio import published_controlnet


def test_covers_every_published_key(shared: Path) -> None:
    """Of EzAudio-L's model, whose keys and shapes are known; those of the embedding are its authors' code's."""
    official = json.loads((shared / "golden/ezaudio_official_shapes.json").read_text())["l"]
    frequencies = inverse_frequencies(64)
    with torch.device("meta"):
        model = {key: torch.empty(shape) for key, shape in official["keys"].items()}
        weights = controlnet_weights(model, width=1024, depth=24)
    weights = {key: frequencies if key.endswith("inv_freq") else value for key, value in weights.items()}
    control = ezaudio_controlnet(weights, {**official["config"], **CONTROL})
    assert len(control.in_blocks) == len(control.projections) == 12
    assert control.embedding.values_per_frame == 2
    assert sum(parameter.numel() for parameter in control.parameters()) == 291_225_732


def test_names_lead_back(shared: Path) -> None:
    model, config = read_published(shared, DENOISER)
    weights = controlnet_weights(model, width=config["embed_dim"], depth=config["depth"])
    control = ezaudio_controlnet(weights, {**config, **CONTROL})
    back = published_controlnet(control.state_dict())
    learned = {key: value for key, value in weights.items() if not key.endswith("inv_freq")}
    assert set(back) == set(learned)
    assert all(torch.equal(back[key], value) for key, value in learned.items())


def test_what_is_left_over_or_of_another_kind_is_refused(shared: Path, tmp_path: Path) -> None:
    model, config = read_published(shared, DENOISER)
    weights = controlnet_weights(model, width=config["embed_dim"], depth=config["depth"])
    described = {**config, **CONTROL}
    with pytest.raises(CheckpointError, match=r"projections\.0\.bias"):
        ezaudio_controlnet({k: v for k, v in weights.items() if k != "controlnet_zero_blocks.0.bias"}, described)
    with pytest.raises(CheckpointError, match="unexpected in the checkpoint: mid_block"):
        ezaudio_controlnet(weights | {"mid_block.weight": torch.zeros(1)}, described)
    other = {**described, "conditioner": {**CONTROL["conditioner"], "condition_type": "chroma"}}
    with pytest.raises(ValueError, match=r"conditioner\.condition_type: chroma` is not supported, only energy"):
        ezaudio_controlnet(weights, other)


def test_the_script_takes_the_published_yaml(shared: Path, tmp_path: Path) -> None:
    model, config = read_published(shared, DENOISER)
    weights = controlnet_weights(model, width=config["embed_dim"], depth=config["depth"])
    torch.save({"model": weights}, tmp_path / "s3_l_energy.pt")
    (tmp_path / "energy_l.yml").write_text(json.dumps({"model_name": "EzAudio-L-Energy", "model": config, **CONTROL}))
    described = read_model_config(tmp_path / "energy_l.yml")
    convert_checkpoint("ezaudio_controlnet", tmp_path / "s3_l_energy.pt", described, tmp_path / "out")
    assert torch.equal(
        load_component(tmp_path / "out").projections[1].weight, weights["controlnet_zero_blocks.1.weight"]
    )
