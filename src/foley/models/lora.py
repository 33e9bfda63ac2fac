"""Low-rank adapters, by `peft`: LoRA (Hu et al. 2022) and DoRA (Liu et al. 2024), for whatever trains with them.

    LoRA    W' = W + (alpha / rank) B A
    DoRA    W' = m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, norms row by row, m learnt

B starts at zero, and m at the norms of W, so that both begin as the weight W itself. Distillation wraps a denoiser in
`AdaptedDenoiser`; what is trained for one's own sounds becomes files (`foley.system.adapters`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor, nn

_OURS = ("to_q", "to_k", "to_v", "attention.output", "layer.input", "layer.output")
_OF_TEXT = ("feed_forward.input", "feed_forward.output")
_OF_DIFFUSERS = ("to_out.0", "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2")
TARGETS = (*_OURS, *_OF_TEXT, *_OF_DIFFUSERS)
"""Ends of the names of the linear layers in attention and feed-forward layers: ours, and those of diffusers."""


@dataclass(frozen=True)
class Lora:
    """How large adapters are, and where.

    Args:
        rank: of each adapter.
        alpha: scale of the adapters; `rank` by default, which leaves their product as it is.
        targets: ends of the names of the linear layers to adapt; a model has some of them.
        dora: split each weight into magnitude and direction, and adapt both.
    """

    rank: int = 16
    alpha: float | None = None
    targets: Sequence[str] = TARGETS
    dora: bool = False

    def inject(self, module: nn.Module) -> None:
        """Put adapters around the layers of `module`, in place, and freeze all else.

        Raises what `peft` does where the module has none of the targets, and ValueError for a rank below 1.
        """
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and of no use to other models

        alpha, targets = cast(int, self.alpha or self.rank), list(self.targets)
        adapters = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets, use_dora=self.dora)
        inject_adapter_in_model(adapters, adaptable(module))


def adaptable(module: nn.Module) -> nn.Module:
    """What adapters of `module` are around: itself, or the model inside that it calls in its own way (`adapts`)."""
    inner: nn.Module = getattr(module, "adapts", module)
    return inner


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of `module` that have adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def put_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each of `layers` into the place of that name."""
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, layer)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """`module` as it was before it had adapters, inside the context."""
    layers = list(adapted_layers(module).values())  # those of text encoders and denoisers alike
    try:
        for layer in layers:
            layer._disable_adapters = True  # `enable_adapters` would set which parameters train, too
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class AdaptedDenoiser(nn.Module):
    """A denoiser whose weights are frozen but for adapters; so it begins as the denoiser.

    An embedding of the guidance scale, which only a student has, trains whole.

    Args:
        denoiser: adapted in place.
        rank, alpha, targets, dora: as for `Lora`.

    Raises as `Lora.inject` does.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] = TARGETS,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.lora = Lora(rank, alpha, list(targets), dora)
        self.lora.inject(denoiser)
        self.denoiser = denoiser
        self.latent_channels = denoiser.latent_channels
        embedding = getattr(denoiser, "guidance_embedding", None)
        if embedding is not None:
            embedding.requires_grad_(True)  # all of it, with no adapter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the denoiser's own."""
        prediction: Tensor = self.denoiser(*args, **kwargs)
        return prediction

    def config(self, denoiser: Mapping[str, Any]) -> dict[str, Any]:
        """How to build this module, from how to build the denoiser in it."""
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"_target_": target, "denoiser": dict(denoiser), **asdict(self.lora)}

    def folded(self) -> nn.Module:
        """The denoiser with the adapters added to its weights, without a trace of them; this module is used up."""
        layers = adapted_layers(self.denoiser)
        for layer in layers.values():
            layer.merge()  # W' of the head of this module
        put_layers(self.denoiser, {name: layer.get_base_layer() for name, layer in layers.items()})
        del self.denoiser.peft_config  # the last trace
        return self.denoiser
