"""Find the cacheable layers of a denoiser: those that declare it, or else those of the blocks of diffusers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Forward = Callable[..., Any]

_BLOCK = re.compile(r"(^|.*\.)transformer_blocks\.\d+")  # `transformer_blocks.3`, at any depth
_BLOCK_NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}
"""The layers of a block of diffusers, and the norm that comes before each."""


def layer_kind(layer: str) -> str:
    """The kind of a layer is the last part of its name: `in_blocks.0.feed_forward`, `transformer_blocks.3.attn1`."""
    return layer.rpartition(".")[2]


@dataclass(frozen=True)
class CacheableLayer:
    """A sub-module whose output may be reused. `name` is its full dotted name, so no two layers share one.

    `norm` is a module outside the layer that feeds it alone, and need not run either where the layer is reused.
    """

    name: str
    kind: str
    module: nn.Module
    norm: nn.Module | None = None


def find_cacheable_layers(denoiser: nn.Module) -> list[CacheableLayer]:
    """The sub-modules that declare `cacheable_kind`, in order of registration, which is that of execution.

    Where none does, `attn1`, `attn2` and `ff` of every `transformer_blocks.<i>`, as the transformers of diffusers and
    the blocks of its U-Nets call them. For another model, name the layers first: `declare_cacheable_layers`.

    Raises:
        ValueError: the denoiser has none.
    """
    modules = dict(denoiser.named_modules())  # in order of registration
    layers = [
        CacheableLayer(name, module.cacheable_kind, module, modules.get(getattr(module, "cacheable_norm", None)))
        for name, module in modules.items()
        if isinstance(getattr(module, "cacheable_kind", None), str)
    ]
    layers = layers or _layers_of_diffusers_blocks(modules)  # what is declared goes before what is guessed from names
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} has no cacheable layer: none of its sub-modules sets `cacheable_kind` "
            "('self_attention', 'cross_attention' or 'feed_forward') or is called transformer_blocks.<i>.attn1, "
            ".attn2 or .ff; name them with `declare_cacheable_layers`"
        )
    return layers


def declare_cacheable_layers(denoiser: nn.Module, names: Mapping[str, str | None]) -> None:
    """Say which sub-modules of a model that is not ours may be reused; the kind is the last part of a layer's name.

    Args:
        names: patterns such as `blocks.*.attn` to the name, beside the layer, of the norm that feeds it and nothing
            else (`norm1`), or to None where the norm is within the layer, or feeds others too.

    Raises:
        ValueError: a pattern fits nothing, or a layer has no such neighbour.
    """
    modules = dict(denoiser.named_modules())
    for pattern, norm in names.items():
        found = [name for name in modules if fnmatchcase(name, pattern)]  # `*` stands for dots too
        # A layer at the top has no parent: its neighbour's name begins without a dot.
        neighbours = {name: f"{name.rpartition('.')[0]}.{norm}".lstrip(".") for name in found if norm is not None}
        absent = [neighbour for neighbour in neighbours.values() if neighbour not in modules]
        if not found or absent:
            raise ValueError(
                f"cacheable layers: {type(denoiser).__name__} has no sub-module {absent[0] if absent else pattern!r}; "
                f"its last ones are {', '.join(list(modules)[-4:])}"
            )
        for name in found:
            modules[name].cacheable_kind = layer_kind(name)
            modules[name].cacheable_norm = neighbours.get(name)


def _layers_of_diffusers_blocks(modules: Mapping[str, nn.Module]) -> list[CacheableLayer]:
    layers = []
    for name, module in modules.items():
        block, _, kind = name.rpartition(".")  # "transformer_blocks.3", "attn1"
        if kind in _BLOCK_NORMS and _BLOCK.fullmatch(block):
            # A norm that feeds more than this layer must run, even where the layer is reused.
            norm = modules.get(f"{block}.{_BLOCK_NORMS[kind]}") if _norms_feed_one_layer(modules[block]) else None
            layers.append(CacheableLayer(name, kind, module, norm))
    return layers


def _norms_feed_one_layer(block: nn.Module) -> bool:
    """Blocks modulated by the time share their norms (PixArt's norm2), or make gates in them (DiT's norm1)."""
    # Stable Audio's block has plain norms and names no type.
    return getattr(block, "norm_type", "") == "layer_norm" or type(block).__name__ == "StableAudioDiTBlock"
