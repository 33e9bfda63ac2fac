"""Published waveform-VAE weights (Stable Audio's `oobleck` layout, as EzAudio ships them) to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foley.checkpoint import build_component, load_state
from foley.models.vae.waveform_vae import WaveformVAE

CODEC_TARGET = "foley.models.vae.waveform_vae.WaveformVAE"
_LEAVES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
    "bias": "bias",
    "alpha": "log_alpha",
    "beta": "log_beta",
}
_UNIT = re.compile(r"layers\.(\d+)\.layers\.(\d+)\.layers\.(\d+)$")
_STAGE = re.compile(r"layers\.(\d+)\.layers\.(\d+)$")
_TOP = re.compile(r"layers\.(\d+)$")


def waveform_vae(state_dict: Mapping[str, Tensor], model_config: Mapping[str, Any]) -> WaveformVAE:
    """Build a WaveformVAE from a published state dict.

    Args:
        state_dict: keys `encoder.layers...` and `decoder.layers...`, weight norm as `weight_g`, `weight_v`.
        model_config: the published `config` (`encoder.config` holds `channels`, `c_mults`, `strides`), or a plain
            config of ours with `_target_`.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: where keys or shapes are left over on either side.
        KeyError: where a key is not of the published layout.
    """
    config = dict(model_config) if "_target_" in model_config else codec_config(model_config)
    model: WaveformVAE = build_component(config, "published waveform VAE")
    stages = len(model.strides)
    renamed = {rename_key(key, stages): tensor for key, tensor in state_dict.items()}
    load_state(model, renamed, "published waveform VAE")
    return model.eval()


def codec_config(published: Mapping[str, Any], sample_rate_hz: int = 24000) -> dict[str, Any]:
    """Our plain config for a published one."""
    encoder = published["encoder"]["config"]
    return {
        "_target_": CODEC_TARGET,
        "channels": encoder["channels"],
        "multipliers": list(encoder["c_mults"]),
        "strides": list(encoder["strides"]),
        "latent_channels": published["latent_dim"],
        "sample_rate_hz": sample_rate_hz,
        "num_units": [3] * len(encoder["strides"]),
    }


def rename_key(key: str, stages: int) -> str:
    """The name of published key `key` in a WaveformVAE with so many stages."""
    part, path = key.split(".", 1)
    path, leaf = path.rsplit(".", 1)
    return f"{part}.{_rename_module(part, path, stages)}.{_LEAVES[leaf]}"


def _rename_module(part: str, path: str, stages: int) -> str:
    # Both halves number: 0 stem, 1..n stages, n+1 activation, n+2 head. An encoder stage holds its three units first,
    # a decoder stage after its activation and resampling.
    first_unit, activation, resample = (0, 3, 4) if part == "encoder" else (2, 0, 1)
    if match := _UNIT.match(path):
        stage, unit, layer = map(int, match.groups())
        return f"stages.{stage - 1}.units.{unit - first_unit}.layers.{layer}"
    if match := _STAGE.match(path):
        stage, layer = map(int, match.groups())
        return f"stages.{stage - 1}.{ {activation: 'activation', resample: 'resample'}[layer] }"
    if match := _TOP.match(path):
        return {0: "stem", stages + 1: "activation", stages + 2: "head"}[int(match.group(1))]
    raise KeyError(f"{part}.{path} is not a module of the published waveform VAE")
