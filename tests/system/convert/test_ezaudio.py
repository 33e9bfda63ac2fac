import json

import pytest
import torch
from safetensors import safe_open

from foley.core.components import CheckpointError, build_component
from foley.nn.rotary import inverse_frequencies
from foley.system.convert import ezaudio_denoiser
from foley.system.convert.ezaudio import denoiser_config

VARIANTS = ["ezaudio_dit_tiny", "crossdit_tiny", "pixart_tiny"]


def read_golden(shared, name):
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    return tensors, weights, config


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_predicts_what_the_published_model_predicts(shared, name):
    golden, weights, config = read_golden(shared, name)
    denoiser = ezaudio_denoiser(weights, config)
    assert not denoiser.training
    given = (golden["in.x"], golden["in.t"], golden["in.context"], golden["in.context_mask"])
    hidden = golden["in.mae_mask"][:, 0]
    outputs = {
        "out.plain": denoiser(*given),
        "out.inpaint": denoiser(*given, visible=golden["in.gt"], hidden_mask=hidden),
        "out.x_mask": denoiser(*given, frame_mask=golden["in.x_mask"]),
    }
    for key, output in outputs.items():
        torch.testing.assert_close(output, golden[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "parameters"), [("l", 596_830_080), ("xl", 874_760_256)])
def test_covers_every_published_key_and_counts_every_parameter(shared, size, parameters):
    official = json.loads((shared / "golden/ezaudio_official_shapes.json").read_text())[size]
    config = official["config"]
    frequencies = inverse_frequencies(config["embed_dim"] // config["num_heads"])
    with torch.device("meta"):
        published = {
            key: frequencies if key.endswith("inv_freq") else torch.empty(shape)
            for key, shape in official["keys"].items()
        }
    denoiser = ezaudio_denoiser(published, config)  # refuses keys left over on either side
    assert {parameter.device.type for parameter in denoiser.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == official["n_params"] == parameters


@pytest.mark.parametrize(("modulation", "millions"), [("AdaLN", 688.7), ("AdaLNSingle", 537.7)])
def test_ablation_variants_have_the_papers_parameter_counts(shared, modulation, millions):
    official = json.loads((shared / "golden/ezaudio_official_shapes.json").read_text())["l"]
    switches = {"qk_norm": False, "long_skips": False, "rotary": False, "learned_positions": 500}
    config = denoiser_config(official["config"]) | switches
    with torch.device("meta"):
        denoiser = build_component(config | {"modulation": {"_target_": f"foley.nn.adaln.{modulation}"}})
    assert round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6, 1) == millions


def test_missing_weights_and_foreign_options_are_refused(shared):
    _, weights, config = read_golden(shared, "ezaudio_dit_tiny")
    with pytest.raises(CheckpointError, match="mask_embedding"):
        ezaudio_denoiser({key: value for key, value in weights.items() if key != "mask_embed"}, config)
    with pytest.raises(ValueError, match="act_layer"):
        ezaudio_denoiser(weights, config | {"act_layer": "gelu"})
    with pytest.raises(ValueError, match="time_fusion: token"):
        ezaudio_denoiser(weights, config | {"time_fusion": "token"})
    foreign = {key: value * 2 if key.endswith("inv_freq") else value for key, value in weights.items()}
    with pytest.raises(ValueError, match="inv_freq"):
        ezaudio_denoiser(foreign, config)
