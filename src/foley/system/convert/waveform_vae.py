"""Published waveform-VAE weights (Stable Audio's `oobleck` layout, as EzAudio ships them) to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foley.models.codec.waveform_vae import WaveformVAE
from foley.system.convert.files import build_around, check_options, flat_options

_SOURCE = "published waveform VAE"
_TRAINING_PREFIX = "autoencoder."
_NEEDED = ("latent_dim", "encoder.config.channels", "encoder.config.c_mults", "encoder.config.strides")
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "encoder.type": ("oobleck",),
    "decoder.type": ("oobleck",),
    "bottleneck.type": ("vae",),
    "encoder.config.use_snake": (True,),
    "decoder.config.use_snake": (True,),
    "decoder.config.final_tanh": (False,),
    "io_channels": (1,),
}
CODEC_TARGET = "foley.models.codec.waveform_vae.WaveformVAE"
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


def waveform_vae(
    state_dict: Mapping[str, Tensor], model_config: Mapping[str, Any], source: str = _SOURCE
) -> WaveformVAE:
    """The published codec in eval mode, around the tensors given.

    Args:
        state_dict: keys `encoder.layers...` and `decoder.layers...`, weight norm as `weight_g`, `weight_v`; or all of
            a training save, which has them under `autoencoder.`.
        model_config: the published `config` (`encoder.config` holds `channels`, `c_mults`, `strides`), or a plain
            config of ours with `_target_`.
        source: where the weights are from, for errors.

    Raises:
        ValueError: an option that is missing or that we do not build.
        CheckpointError: where keys or shapes are left over on either side.
    """
    config = codec_config(model_config, source)
    model: WaveformVAE = build_around(config, codec_state(state_dict, len(config["strides"])), source)
    return model


def codec_config(published: Mapping[str, Any], source: str = _SOURCE) -> dict[str, Any]:
    """Our plain config for a published one, which is at 24 kHz unless it says otherwise; ours is returned as it is.

    Raises ValueError for options that are missing or that we do not build.
    """
    if "_target_" in published:
        return dict(published)
    check_options(flat_options(published), _NEEDED, _SUPPORTED, source)
    encoder = published["encoder"]["config"]
    return {
        "_target_": CODEC_TARGET,
        "channels": encoder["channels"],
        "multipliers": list(encoder["c_mults"]),
        "strides": list(encoder["strides"]),
        "latent_channels": published["latent_dim"],
        "sample_rate_hz": published.get("sample_rate", 24000),
        "num_units": [3] * len(encoder["strides"]),
    }


def codec_state(state_dict: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """Published weights under our names; of a training save the codec alone, without its discriminator."""
    if any(key.startswith(_TRAINING_PREFIX) for key in state_dict):
        kept = {key: value for key, value in state_dict.items() if key.startswith(_TRAINING_PREFIX)}
        state_dict = {key.removeprefix(_TRAINING_PREFIX): value for key, value in kept.items()}
    return {rename_key(key, stages): value for key, value in state_dict.items()}


def rename_key(key: str, stages: int) -> str:
    """The name of published key `key` in a WaveformVAE with so many stages; a key of no such layout keeps its own."""
    part, _, path = key.partition(".")
    path, _, leaf = path.rpartition(".")
    module = _rename_module(part, path, stages)
    return f"{part}.{module}.{_LEAVES[leaf]}" if module and leaf in _LEAVES else key


def _rename_module(part: str, path: str, stages: int) -> str | None:
    # Both halves number: 0 stem, 1..n stages, n+1 activation, n+2 head. An encoder stage holds its three units first,
    # a decoder stage after its activation and resampling.
    first_unit, activation, resample = (0, 3, 4) if part == "encoder" else (2, 0, 1)
    if match := _UNIT.match(path):
        stage, unit, layer = map(int, match.groups())
        return f"stages.{stage - 1}.units.{unit - first_unit}.layers.{layer}"
    if match := _STAGE.match(path):
        stage, layer = map(int, match.groups())
        name = {activation: "activation", resample: "resample"}.get(layer)
        return name and f"stages.{stage - 1}.{name}"
    if match := _TOP.match(path):
        return {0: "stem", stages + 1: "activation", stages + 2: "head"}.get(int(match.group(1)))
    return None
