"""Published BigVGAN generators (v1 and v2, and AudioLCM's at 16 kHz) as `BigVGAN`."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foley.models.codec.vocoder import BigVGAN, low_pass_filter
from foley.system.convert.files import build_around, check_options

_SOURCE = "published BigVGAN weights"
_NEEDED = (
    *("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel"),
    *("resblock_kernel_sizes", "resblock_dilation_sizes"),
    *("num_mels", "n_fft", "win_size", "hop_size", "sampling_rate", "fmin", "fmax"),
)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "resblock": ("1", "2"),
    "activation": ("snake", "snakebeta"),
    "snake_logscale": (True,),
}
_FILTER = re.compile(r"\.(upsample|downsample\.lowpass)\.filter$")
_LEAVES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
    "act.alpha": "snake.log_alpha",
    "act.beta": "snake.log_beta",
}
_TOP = {"conv_pre.": "stem.", "conv_post.": "head.", "activation_post.": "activation."}
_UP = re.compile(r"^ups\.(\d+)\.0\.")
_BLOCK = re.compile(r"^resblocks\.(\d+)\.(convs|convs1|convs2|activations)\.(\d+)\.")


def vocoder_config(published: Mapping[str, Any], source: str = _SOURCE) -> dict[str, Any]:
    """Our component config for a published one; one of ours is returned as it is.

    The logarithm of the published mel spectrograms is natural; `decimal_log: true` beside the published options says
    that it is the one to base 10, as for AudioLCM's vocoder.

    Raises ValueError for options that are missing or that we do not build.
    """
    if "_target_" in published:
        return dict(published)
    check_options(published, _NEEDED, _SUPPORTED, source)
    _check_layout(published, source)
    return {
        "_target_": "foley.models.codec.vocoder.BigVGAN",
        "spectrogram": {
            "_target_": "foley.models.codec.mel_vae.MelSpectrogram",
            "sample_rate_hz": published["sampling_rate"],
            "mel_bands": published["num_mels"],
            "window_samples": published["n_fft"],
            "hop_samples": published["hop_size"],
            "lowest_hz": published["fmin"],
            "highest_hz": published["fmax"],
            "decimal_log": published.get("decimal_log", False),
        },
        "channels": published["upsample_initial_channel"],
        "strides": list(published["upsample_rates"]),
        "kernels": list(published["resblock_kernel_sizes"]),
        "dilations": list(published["resblock_dilation_sizes"][0]),
        "convs_per_unit": 2 if published["resblock"] == "1" else 1,
        "final_bias": published.get("use_bias_at_final", True),
        "final_tanh": published.get("use_tanh_at_final", True),
    }


def _check_layout(published: Mapping[str, Any], source: str) -> None:
    """Raises ValueError for sizes that are possible in a published config, but that no published model has."""
    rates, dilations = list(published["upsample_rates"]), published["resblock_dilation_sizes"]
    complaints = {
        "upsample_kernel_sizes": list(published["upsample_kernel_sizes"]) != [2 * rate for rate in rates],
        "resblock_dilation_sizes": any(list(each) != list(dilations[0]) for each in dilations),
        "win_size": published["win_size"] != published["n_fft"],
    }
    for name in (name for name, wrong in complaints.items() if wrong):
        raise ValueError(
            f"{source}: `{name}: {published[name]}` is not supported: kernels must be twice upsample_rates {rates}, "
            "all blocks dilated alike, and the window as long as the transform"
        )


def rename(key: str, blocks_per_stage: int, convs_per_unit: int) -> str:
    """The name of published key `key` in a BigVGAN with so many; a key of no such layout keeps its own."""
    for published, own in _TOP.items():
        key = own + key.removeprefix(published) if key.startswith(published) else key
    key = _UP.sub(r"stages.\1.resample.", key)
    key = _BLOCK.sub(lambda match: _unit_layer(match, blocks_per_stage, convs_per_unit), key)
    leaf = next((leaf for leaf in _LEAVES if key.endswith(f".{leaf}")), None)
    return key.removesuffix(leaf) + _LEAVES[leaf] if leaf else key


def _unit_layer(match: re.Match[str], blocks_per_stage: int, convs_per_unit: int) -> str:
    """A unit is [snake, convolution], once (`convs`) or twice (`convs1`, `convs2`); snakes are numbered in a row."""
    stage, block = divmod(int(match[1]), blocks_per_stage)
    kind, index = match[2], int(match[3])
    if kind == "activations":
        unit, place = divmod(index, convs_per_unit)
        layer = 2 * place
    else:
        unit, layer = index, 3 if kind == "convs2" else 1
    return f"stages.{stage}.blocks.{block}.{unit}.layers.{layer}."


def vocoder_state(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published weights under our names, without the filters, which are not learned.

    A Snake without a separate amplitude is one whose amplitude is its frequency.
    """
    blocks, convs = len(config["kernels"]), config["convs_per_unit"]
    state = {rename(key, blocks, convs): value for key, value in state_dict.items() if not _FILTER.search(key)}
    tied = {key.replace("log_alpha", "log_beta"): value.clone() for key, value in state.items() if "log_alpha" in key}
    return tied | state


def bigvgan(state_dict: Mapping[str, Tensor], model_config: Mapping[str, Any], source: str = _SOURCE) -> BigVGAN:
    """The published vocoder in eval mode, around the tensors given.

    Args:
        state_dict: of the generator, under its published names; weight norm as `weight_g` and `weight_v`, or as
            PyTorch's parametrizations.
        model_config: the published config, or a plain config of ours with `_target_`.
        source: where the weights are from, for errors.

    Raises:
        ValueError: an option that is missing or that we do not build, or low-pass filters of another kind.
        CheckpointError: weights and config that do not fit.
    """
    config = vocoder_config(model_config, source)
    _check_filters(state_dict, source)
    model: BigVGAN = build_around(config, vocoder_state(state_dict, config), source)
    return model


def _check_filters(state_dict: Mapping[str, Tensor], source: str) -> None:
    expected = low_pass_filter()
    for key, value in state_dict.items():
        rounding = 10 * torch.finfo(value.dtype).eps
        if _FILTER.search(key) and not torch.allclose(value.flatten().float().cpu(), expected, atol=rounding):
            raise ValueError(f"{source}: {key} is not the low-pass filter of the published models")
