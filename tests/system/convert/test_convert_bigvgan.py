"""Published BigVGAN generators: every key finds its place, and the output is that of the published layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv_transpose1d, pad

from foley.core.components import CheckpointError, load_component
from foley.core.hashing import hash_module
from foley.models.codec.vocoder import low_pass_filter
from foley.system.convert.bigvgan import bigvgan, vocoder_config
from foley.system.convert.conversion import convert_checkpoint, load_converted
from foley.system.convert.files import read_model_config

BASE_22KHZ_80BAND: dict[str, Any] = {
    "resblock": "1",
    **{"upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4], "upsample_initial_channel": 512},
    **{"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]]},
    **{"activation": "snakebeta", "snake_logscale": True},
    **{"num_mels": 80, "n_fft": 1024, "win_size": 1024, "hop_size": 256},
    **{"sampling_rate": 22050, "fmin": 0, "fmax": 8000},
}
AUDIOSET_16KHZ_80BAND = {
    **BASE_22KHZ_80BAND,
    **{"upsample_rates": [4, 4, 2, 2, 2, 2], "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4]},
    **{"upsample_initial_channel": 1536, "sampling_rate": 16000, "fmin": 125, "fmax": 7600},
}
SMALL = {
    **BASE_22KHZ_80BAND,
    **{"upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4], "upsample_initial_channel": 12},
    **{"num_mels": 5, "n_fft": 32, "win_size": 32, "hop_size": 8},
    **{"resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3], [1, 3]]},
}


def published_state(config: dict[str, Any], norm: tuple[str, str] = ("weight_g", "weight_v")) -> dict[str, Tensor]:
    """Random weights under the published names, in the published shapes."""
    state: dict[str, Tensor] = {}

    def conv(name: str, *shape: int, bias: int) -> None:
        state[f"{name}.bias"] = 0.1 * torch.randn(bias)
        state[f"{name}.{norm[0]}"] = 0.5 + 2 * torch.rand(shape[0], 1, 1)
        state[f"{name}.{norm[1]}"] = torch.randn(shape)

    def activation(name: str, channels: int) -> None:
        for parameter in ("alpha", "beta") if config["activation"] == "snakebeta" else ("alpha",):
            state[f"{name}.act.{parameter}"] = 0.3 * torch.randn(channels)
        for place in ("upsample", "downsample.lowpass"):
            state[f"{name}.{place}.filter"] = low_pass_filter()[None, None]

    width, kernels = config["upsample_initial_channel"], config["resblock_kernel_sizes"]
    lists = ["convs1", "convs2"] if config["resblock"] == "1" else ["convs"]
    conv("conv_pre", width, config["num_mels"], 7, bias=width)
    for stage, size in enumerate(config["upsample_kernel_sizes"]):
        conv(f"ups.{stage}.0", width, width // 2, size, bias=width // 2)
        width //= 2
        for index, (kernel, dilations) in enumerate(zip(kernels, config["resblock_dilation_sizes"], strict=True)):
            block = f"resblocks.{stage * len(kernels) + index}"
            for name in lists:
                for unit in range(len(dilations)):
                    conv(f"{block}.{name}.{unit}", width, width, kernel, bias=width)
            for place in range(len(lists) * len(dilations)):
                activation(f"{block}.activations.{place}", width)
    activation("activation_post", width)
    conv("conv_post", 1, width, 7, bias=1)
    return state


def published_forward(state: dict[str, Tensor], config: dict[str, Any], signal: Tensor) -> Tensor:
    """The published generator, written as functions of its state dict."""

    def weight(name: str) -> Tensor:
        direction = state[f"{name}.weight_v"]
        return state[f"{name}.weight_g"] * direction / direction.norm(dim=(1, 2), keepdim=True)

    def conv(name: str, signal: Tensor, dilation: int = 1) -> Tensor:
        size = state[f"{name}.weight_v"].shape[2]
        return conv1d(
            signal, weight(name), state[f"{name}.bias"], padding=dilation * (size - 1) // 2, dilation=dilation
        )

    def activation(name: str, signal: Tensor) -> Tensor:
        channels = signal.shape[1]
        up, down = (
            state[f"{name}.{place}.filter"].expand(channels, 1, -1) for place in ("upsample", "downsample.lowpass")
        )
        held = pad(signal, (5, 5), mode="replicate")
        doubled = 2 * conv_transpose1d(held, up, stride=2, groups=channels)[..., 15:-15]
        alpha = state[f"{name}.act.alpha"].exp()[:, None]
        beta = state.get(f"{name}.act.beta", state[f"{name}.act.alpha"]).exp()[:, None]
        bent = doubled + (alpha * doubled).sin() ** 2 / (beta + 1e-9)
        return conv1d(pad(bent, (5, 6), mode="replicate"), down, stride=2, groups=channels)

    def block(name: str, signal: Tensor, dilations: list[int]) -> Tensor:
        for unit, dilation in enumerate(dilations):
            if config["resblock"] == "1":
                hidden = conv(f"{name}.convs1.{unit}", activation(f"{name}.activations.{2 * unit}", signal), dilation)
                hidden = conv(f"{name}.convs2.{unit}", activation(f"{name}.activations.{2 * unit + 1}", hidden))
            else:
                hidden = conv(f"{name}.convs.{unit}", activation(f"{name}.activations.{unit}", signal), dilation)
            signal = signal + hidden
        return signal

    signal, count = conv("conv_pre", signal), len(config["resblock_kernel_sizes"])
    for stage, rate in enumerate(config["upsample_rates"]):
        name = f"ups.{stage}.0"
        signal = conv_transpose1d(signal, weight(name), state[f"{name}.bias"], stride=rate, padding=rate // 2)
        blocks = [
            block(f"resblocks.{stage * count + index}", signal, dilations)
            for index, dilations in enumerate(config["resblock_dilation_sizes"])
        ]
        signal = sum(blocks[1:], blocks[0]) / count
    return conv("conv_post", activation("activation_post", signal)).tanh()


@pytest.mark.parametrize("resblock", ["1", "2"])
@pytest.mark.parametrize("activation", ["snake", "snakebeta"])
@torch.no_grad()
def test_it_computes_what_the_published_layers_do(resblock: str, activation: str) -> None:
    torch.manual_seed(0)
    config = {**SMALL, "resblock": resblock, "activation": activation}
    state, mel = published_state(config), torch.randn(2, 5, 9)
    audio = bigvgan(state, config)(mel)
    assert audio.shape == (2, 1, 72)
    assert audio.std() > 0.05
    torch.testing.assert_close(audio, published_forward(state, config, mel), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "million_parameters"), [(BASE_22KHZ_80BAND, 14), (AUDIOSET_16KHZ_80BAND, 112)])
def test_covers_the_published_generators(config: dict[str, Any], million_parameters: int) -> None:
    with torch.device("meta"):
        state = {key: torch.empty_like(value) for key, value in published_state(config).items() if "filter" not in key}
    vocoder = bigvgan(state, config)  # refuses keys left over on either side
    assert round(sum(parameter.numel() for parameter in vocoder.parameters()) / 1e6) == million_parameters
    assert vocoder.spectrogram.settings[:4] == (config["sampling_rate"], 80, 1024, 256)
    assert vocoder.spectrogram.settings[4:] == (config["fmin"], config["fmax"], False)


def test_parametrizations_are_the_same_weights() -> None:
    torch.manual_seed(0)
    old = published_state(SMALL)
    new = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in old.items()
    }
    assert hash_module(bigvgan(new, SMALL)) == hash_module(bigvgan(old, SMALL))


def test_a_generator_file_becomes_a_component(tmp_path: Path) -> None:
    state = published_state(SMALL)
    torch.save({"generator": state}, tmp_path / "g_00000001.pt")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    convert_checkpoint("bigvgan", tmp_path / "g_00000001.pt", read_model_config(tmp_path / "config.json"), tmp_path)
    loaded, mel = load_component(tmp_path), torch.randn(1, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(mel), published_forward(state, SMALL, mel), atol=1e-4, rtol=1e-3)
    assert "BigVGAN vocoder" in (tmp_path / "README.md").read_text()


def test_a_cached_conversion_hears_the_same(tmp_path: Path) -> None:
    """Its spectrogram and filters have values, although weights are mapped into a module built without them."""
    torch.save({"generator": published_state(SMALL)}, tmp_path / "g.pt")
    cached = load_converted("bigvgan", tmp_path / "g.pt", SMALL, tmp_path / "cache")
    direct = convert_checkpoint("bigvgan", tmp_path / "g.pt", SMALL, tmp_path / "out")
    audio = torch.randn(1, 1, 64)
    with torch.no_grad():
        outputs = [vocoder(vocoder.spectrogram(audio)) for vocoder in (cached, direct)]
    assert torch.equal(*outputs)


def test_newer_generators_clip_and_have_no_final_bias() -> None:
    config = {**SMALL, "use_bias_at_final": False, "use_tanh_at_final": False, "decimal_log": True}
    state = {key: value for key, value in published_state(config).items() if key != "conv_post.bias"}
    vocoder = bigvgan(state, config)
    assert not vocoder.final_tanh
    assert vocoder.head.bias is None
    assert vocoder.spectrogram.decimal_log
    own = vocoder_config(config)
    assert vocoder_config(own) == own


def test_refuses_left_over_keys_and_other_filters() -> None:
    state = published_state(SMALL)
    for foreign in ("resblocks.0.convs3.0.bias", "ups.0.1.bias", "conv_pre.weight", "flat"):
        with pytest.raises(CheckpointError, match="unexpected in the checkpoint"):
            bigvgan({**state, foreign: torch.zeros(1)}, SMALL)
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: stem\.bias"):
        bigvgan({key: value for key, value in state.items() if key != "conv_pre.bias"}, SMALL)
    with pytest.raises(ValueError, match=r"activation_post\.upsample\.filter is not the low-pass filter"):
        bigvgan({**state, "activation_post.upsample.filter": torch.ones(1, 1, 12) / 12}, SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snake_logscale": False}, "`snake_logscale: False` is not supported"),
        ({"upsample_kernel_sizes": [8, 8]}, "`upsample_kernel_sizes"),
        ({"resblock_dilation_sizes": [[1, 3], [1, 5]]}, "`resblock_dilation_sizes"),
        ({"win_size": 16}, "`win_size: 16` is not supported"),
    ],
)
def test_refuses_other_architectures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocoder_config({**SMALL, **changes})
    with pytest.raises(ValueError, match="does not say hop_size"):
        vocoder_config({key: value for key, value in SMALL.items() if key != "hop_size"})
