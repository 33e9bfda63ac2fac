"""TangoFlux's published weights under the names of diffusers, and back.

One file (`tangoflux.safetensors`) holds the transformer, which is diffusers' own under `transformer.`, and two small
parts. The frozen text encoder may lie in it too: that is FLAN-T5 as published, and is read from its own repository.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foley.core.components import CheckpointError, load_state
from foley.system.convert.files import check_options

_TEXT = "text_encoder."
_PARTS = {
    "transformer.": "transformer.",
    "fc.": "conditioner.pooled.",
    "duration_emebdder.": "conditioner.duration.",  # spelt so as published
}
_SIZES = (
    *("num_layers", "num_single_layers", "in_channels", "attention_head_dim", "num_attention_heads"),
    "joint_attention_dim",
)


def to_ours(published: Mapping[str, Tensor], source: str = "TangoFlux") -> dict[str, Tensor]:
    """Published weights under `transformer.` and `conditioner.`, without those of the text encoder.

    Raises CheckpointError for a key of no such layout.
    """
    kept = {key: value for key, value in published.items() if not key.startswith(_TEXT)}
    return _renamed(kept, _PARTS, source)


def to_published(ours: Mapping[str, Tensor], source: str = "TangoFlux") -> dict[str, Tensor]:
    """The inverse of `to_ours`; raises as it does.

    >>> list(to_ours({"fc.0.bias": Tensor()})), list(to_published({"conditioner.pooled.0.bias": Tensor()}))
    (['conditioner.pooled.0.bias'], ['fc.0.bias'])
    """
    return _renamed(ours, {own: published for published, own in _PARTS.items()}, source)


def _renamed(state: Mapping[str, Tensor], parts: Mapping[str, str], source: str) -> dict[str, Tensor]:
    prefixes = {key: next((prefix for prefix in parts if key.startswith(prefix)), None) for key in state}
    if strange := [key for key, prefix in prefixes.items() if prefix is None]:
        raise CheckpointError(f"{source}: {', '.join(strange[:5])} are in none of {', '.join(parts)}")
    return {parts[prefix] + key.removeprefix(prefix): state[key] for key, prefix in prefixes.items() if prefix}


def transformer_config(published: Mapping[str, Any], text_dim: int, source: str = "TangoFlux") -> dict[str, Any]:
    """Arguments of `FluxTransformer2DModel`; raises ValueError where the published config does not say them."""
    check_options(published, (*_SIZES, "audio_seq_len", "max_duration"), {}, source)
    sizes = {name: published[name] for name in _SIZES}
    return {**sizes, "pooled_projection_dim": text_dim, "guidance_embeds": False}


def load_part(module: Any, ours: Mapping[str, Tensor], part: str, source: str) -> None:
    """What lies under `part.` into `module`, strictly; raises CheckpointError where keys or shapes are left over."""
    own = {key.removeprefix(f"{part}."): value for key, value in ours.items() if key.startswith(f"{part}.")}
    load_state(module, own, f"{source} [{part}]", assign=True)
