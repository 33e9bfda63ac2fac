"""The cacheable layers of a denoiser: those that declare it, or else those of diffusers' blocks; and its entry."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from foley.core.hashing import plain_name, uncompiled
from foley.core.logs import get_logger

Forward = Callable[..., Any]

_log = get_logger(__name__)
_warned: WeakSet[nn.Module] = WeakSet()  # models whose attention was not found: layers are looked for again and again

_ATTENTION = re.compile(r"(\w+_)?(attn|attention)\d?")  # attn, attn1, self_attn, cross_attention, ...
_FEED_FORWARD = re.compile(r"((audio|img|txt)_)?(ff|ffn|mlp|feed_forward)(_context)?")
_FUSED = ("attn", "proj_mlp", "act_mlp"), "proj_out"
"""Flux's single blocks: `proj_out` joins attention and feed-forward, and its output is what the gate multiplies."""

_PLAIN_NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}
_NORMS: Mapping[str, Mapping[str, str]] = {
    "AceStepTransformerBlock": {"self_attn": "self_attn_norm", "cross_attn": "cross_attn_norm", "mlp": "mlp_norm"},
    "AudioDiTBlock": {"cross_attn": "cross_attn_norm"},  # LongCat's; its other norms are functions
    "FluxTransformerBlock": {"ff": "norm2", "ff_context": "norm2_context"},
    "HunyuanDiTBlock": _PLAIN_NORMS,
    "JointTransformerBlock": {"ff": "norm2", "ff_context": "norm2_context"},  # SD3's
    "LTXVideoTransformerBlock": {"attn1": "norm1", "ff": "norm2"},
    "StableAudio3DiTBlock": {"self_attn": "pre_norm", "cross_attn": "cross_attend_norm", "ff": "ff_norm"},
    "StableAudioDiTBlock": _PLAIN_NORMS,
    "WanTransformerBlock": {"attn1": "norm1", "attn2": "norm2", "ffn": "norm3"},
}
"""By the block's class: the norms that feed one layer and nothing else, as its forward says.

In other blocks norms feed two layers (PixArt's norm2), or make the gates too (DiT's norm1), and must run.
"""

_RUN_FIRST = {"Lumina2Transformer2DModel": "context_refiner", "WanVACETransformer3DModel": "vace_blocks"}
"""The list that a model runs before those that it registers before it."""


def layer_kind(layer: str) -> str:
    """The kind of a layer is the last part of its name: `in_blocks.0.feed_forward`, `transformer_blocks.3.attn1`."""
    return layer.rpartition(".")[2]


@dataclass(frozen=True)
class CacheableLayer:
    """A sub-module whose output may be reused. `name` is its full dotted name, so no two layers share one.

    `norm` is a module outside the layer that feeds it alone, and need not run either where the layer is reused. So are
    `parts`, modules whose outputs the layer joins: then it stands for them all, and their MACs are its own.
    """

    name: str
    kind: str
    module: nn.Module
    norm: nn.Module | None = None
    parts: tuple[nn.Module, ...] = ()

    @property
    def feeders(self) -> tuple[nn.Module, ...]:
        """All that runs for this layer alone."""
        return self.parts if self.norm is None else (self.norm, *self.parts)


def output_tensors(output: Any) -> list[Tensor]:
    """Of a layer: one tensor, or those of a tuple (joint attention returns the latent's tokens and the text's)."""
    return [output] if isinstance(output, Tensor) else [tensor for tensor in output if isinstance(tensor, Tensor)]


def find_cacheable_layers(denoiser: nn.Module) -> list[CacheableLayer]:
    """The sub-modules that declare `cacheable_kind`, in order of registration, which is that of execution.

    Where none does, those of the blocks of diffusers, by their structure: a block is an entry of a `ModuleList` with
    children called as attention (`attn`, `attn1`, `self_attn`, ...) or feed-forward (`ff`, `ffn`, `ff_context`, `mlp`,
    ...). In blocks such as Flux's single ones, where one projection joins both, that projection stands for the block.
    Attention that is not found so is warned of, once a model. For another model, name the layers first:
    `declare_cacheable_layers`. A compiled model has the layers, and the names, of the model itself.

    Raises:
        ValueError: the denoiser has none; says which lists of blocks it has.
    """
    # Names without compilation's own parts, so that schedules of the plain model fit.
    denoiser = uncompiled(denoiser)
    modules = {plain_name(name): module for name, module in denoiser.named_modules()}  # in order of registration
    layers = [
        CacheableLayer(name, module.cacheable_kind, module, modules.get(str(getattr(module, "cacheable_norm", None))))
        for name, module in modules.items()
        if isinstance(getattr(module, "cacheable_kind", None), str)
    ]
    if not layers:  # what is declared goes before what is guessed from names
        layers = _layers_of_blocks(type(denoiser).__name__, modules)
        _warn_of_missing_attention(denoiser, modules, layers)
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} has no cacheable layer: none of its sub-modules sets `cacheable_kind` "
            "('self_attention', 'cross_attention' or 'feed_forward'), and no entry of a ModuleList has children called "
            f"attn1, self_attn, ff, mlp or the like. Its lists hold: {_lists_of(modules) or 'nothing'}; "
            "name the layers with `declare_cacheable_layers`"
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
    modules = {plain_name(name): module for name, module in denoiser.named_modules()}
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
        # On the modules themselves: so do ours, and whoever is given the model later finds them.
        for name in found:
            modules[name].cacheable_kind = layer_kind(name)
            modules[name].cacheable_norm = neighbours.get(name)


def _layers_of_blocks(model: str, modules: Mapping[str, nn.Module]) -> list[CacheableLayer]:
    """In order of execution, by the name of the model's class."""
    layers = [layer for name in _blocks(modules) for layer in _layers_of_block(name, modules)]
    first = _RUN_FIRST.get(model, "none")

    def place(layer: CacheableLayer) -> int:
        # U-Nets register the middle last, and run it before the way up.
        return {first: -1, "up_blocks": 1}.get(layer.name.partition(".")[0], 0)

    return sorted(layers, key=place)  # stable: else as registered


def _blocks(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of the entries of lists; of a wrapper of another block (HiDream's), of the block inside."""
    for name in modules:
        if isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList):
            yield f"{name}.block" if f"{name}.block" in modules else name


def _layers_of_block(name: str, modules: Mapping[str, nn.Module]) -> list[CacheableLayer]:
    # Of the mapping, where a compiled child is the module itself, and what two blocks share is there once.
    own = (child for child, _ in modules[name].named_children() if f"{name}.{child}" in modules)
    children = {child: modules[f"{name}.{child}"] for child in own}
    parts, joint = _FUSED
    if all(child in children for child in (*parts, joint)):
        joined = tuple(children[part] for part in parts)
        return [CacheableLayer(f"{name}.{joint}", joint, children[joint], parts=joined)]
    norms = _norms_of(modules[name])
    attention = [child for child in children if _ATTENTION.fullmatch(child)]
    feed_forward = [child for child in children if _FEED_FORWARD.fullmatch(child)]
    return [  # blocks attend first, in whatever order they register
        CacheableLayer(f"{name}.{child}", child, children[child], children.get(norms.get(child, "")))
        for child in attention + feed_forward
    ]


def _norms_of(block: nn.Module) -> Mapping[str, str]:
    """The name of the norm of each layer, where it feeds that layer alone."""
    if type(block).__name__ == "BasicTransformerBlock":
        return _PLAIN_NORMS if getattr(block, "norm_type", "") == "layer_norm" else {}
    return _NORMS.get(type(block).__name__, {})


def _warn_of_missing_attention(
    denoiser: nn.Module, modules: Mapping[str, nn.Module], layers: list[CacheableLayer]
) -> None:
    """Name the blocks of which only the feed-forward is found, and what is called attention in a list and not held."""
    if denoiser in _warned or not layers:
        return
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))
    # What lies within a found layer is cached with it, whatever its class is called.
    held = {id(module) for layer in layers for root in (layer.module, *layer.parts) for module in root.modules()}
    missing = [
        f"{name} ({type(module).__name__})"
        for name, module in modules.items()
        if "Attention" in type(module).__name__ and id(module) not in held and name.startswith(lists)
    ]
    found = {layer.name.rpartition(".")[0] for layer in layers if not _FEED_FORWARD.fullmatch(layer.kind)}
    silent = dict.fromkeys(layer.name.rpartition(".")[0] for layer in layers)
    missing += [f"{name} ({_children(modules[name])})" for name in silent if name not in found]
    if missing:
        _warned.add(denoiser)
        _log.warning(
            "%s: attention is not found, and not cached, in %s%s; name its layers with `declare_cacheable_layers`",
            type(denoiser).__name__,
            ", ".join(missing[:3]),
            f" and {len(missing) - 3} more" if len(missing) > 3 else "",
        )


def _lists_of(modules: Mapping[str, nn.Module]) -> str:
    """The lists of a model, with the class and the children of their first entries."""
    firsts = {name.rpartition(".")[0]: module for name, module in modules.items() if name.endswith(".0")}
    lists = {name: entry for name, entry in firsts.items() if isinstance(modules.get(name), nn.ModuleList)}
    return "; ".join(f"{name} of {type(entry).__name__} ({_children(entry)})" for name, entry in lists.items())


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no children"


def entry_of(module: nn.Module) -> str:
    """The name of what a call of the module runs: its forward, or what `module.compile()` has put in its place."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


@contextmanager
def replaced(module: nn.Module, name: str, replacement: Any) -> Iterator[Any]:
    """Gives what was there; that is there again on any exit.

    >>> import torch
    >>> linear = nn.Linear(2, 2)
    >>> with replaced(linear, entry_of(linear), lambda x: x):
    ...     linear(torch.ones(2))
    tensor([1., 1.])
    """
    before, own = getattr(module, name), vars(module).get(name)  # offloading of diffusers sets a forward of its own
    setattr(module, name, replacement)
    try:
        yield before
    finally:
        vars(module).pop(name)  # that of the class shows again
        if own is not None:
            setattr(module, name, own)
