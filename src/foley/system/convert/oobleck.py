"""`AutoencoderOobleck` in a folder that diffusers wrote, such as `vae` of Stable Audio Open, as `OobleckCodec`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from foley.core.components import CONFIG_FILE, CheckpointError
from foley.core.reading import read_json
from foley.models.codec.oobleck import OobleckCodec
from foley.system.convert.files import build_around

_SOURCE = "published Oobleck weights"
_TARGET = "foley.models.codec.oobleck.OobleckCodec"
_KIND = "AutoencoderOobleck"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_OURS = {
    **{name: name for name in ("encoder_hidden_size", "downsampling_ratios", "channel_multiples", "decoder_channels")},
    **{"decoder_input_channels": "latent_channels", "audio_channels": "audio_channels"},
    "sampling_rate": "sample_rate_hz",
}
"""What diffusers calls an option, and what we do."""


def oobleck_config(published: Mapping[str, Any], source: str = _SOURCE) -> dict[str, Any]:
    """Our plain config for that of diffusers; ours stays as it is. Raises ValueError for missing options."""
    if "_target_" in published:
        return dict(published)
    if missing := [name for name in _OURS if name not in published]:
        raise ValueError(f"{source}: the config does not say {', '.join(missing)}; give the config.json beside them")
    return {"_target_": _TARGET, **{ours: published[name] for name, ours in _OURS.items()}}


def oobleck_codec(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], source: str = _SOURCE) -> OobleckCodec:
    """The published codec in eval mode, around the tensors given; raises CheckpointError where they do not fit."""
    state = {f"published.{name}": value for name, value in state_dict.items()}
    codec: OobleckCodec = build_around(config, state, source)
    return codec


def oobleck_folder(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Weights and config of the codec that diffusers wrote into `path`, or into `vae` below it; None where it did not.

    Raises CheckpointError where the weights are missing.
    """
    for folder in (path, path / "vae"):
        config = read_json(folder / CONFIG_FILE, "the config of a model") if (folder / CONFIG_FILE).is_file() else {}
        if config.get("_class_name") == _KIND:
            if not (folder / _WEIGHTS).is_file():
                raise CheckpointError(f"{folder} holds the config of an {_KIND}, but not its {_WEIGHTS}; download it")
            return folder / _WEIGHTS, {name: value for name, value in config.items() if not name.startswith("_")}
    return None
