"""Find the cacheable layers of a denoiser, and replace their forwards for a while."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@dataclass(frozen=True)
class CacheableLayer:
    """A sub-module whose output may be reused. `name` is its full dotted name, so no two layers share one."""

    name: str
    kind: str
    module: nn.Module


def find_cacheable_layers(denoiser: nn.Module) -> list[CacheableLayer]:
    """The sub-modules that declare `cacheable_kind`, in order of registration, which is that of execution.

    Raises:
        ValueError: the denoiser has none.
    """
    layers = [
        CacheableLayer(name, module.cacheable_kind, module)
        for name, module in denoiser.named_modules()
        if isinstance(getattr(module, "cacheable_kind", None), str)
    ]
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} has no cacheable layer: none of its sub-modules sets `cacheable_kind` "
            "('self_attention', 'cross_attention' or 'feed_forward')"
        )
    return layers


@contextmanager
def replaced_forwards(layers: Sequence[CacheableLayer], wrap: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Give layer `i` the forward `wrap(i, its own forward)` inside the context, and its own again on any exit.

    Raises:
        RuntimeError: a layer's forward is replaced already; stacked caches would hide each other's calls.
    """
    taken = [layer.name for layer in layers if "forward" in vars(layer.module)]
    if taken:
        raise RuntimeError(
            f"the forward of {taken[0]!r} ({len(taken)} of {len(layers)} layers) is replaced already: "
            "an accelerator is attached to this denoiser; leave its `attach` context first"
        )
    try:
        for index, layer in enumerate(layers):
            layer.module.forward = wrap(index, layer.module.forward)
        yield
    finally:
        for layer in layers:
            vars(layer.module).pop("forward", None)
