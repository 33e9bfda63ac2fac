"""Low-rank adapters around a frozen denoiser (LoRA, Hu et al. 2022), by `peft`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "attention.output", "layer.input", "layer.output")
"""Ends of the names of the linear layers in attention and feed-forward layers."""


class AdaptedDenoiser(nn.Module):
    """A denoiser whose weights are frozen but for adapters `(alpha / rank) B A`, where B starts at zero.

    So it begins as the denoiser. An embedding of the guidance scale, which only a student has, trains whole.

    Args:
        denoiser: adapted in place.
        rank: of each adapter.
        alpha: scale of the adapters; `rank` by default, which leaves their product as it is.
        targets: ends of the names of the linear layers to adapt.

    Raises what `peft` does where the denoiser has none of them, and ValueError for a rank below 1.
    """

    def __init__(
        self, denoiser: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = TARGETS
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and of no use to other models

        super().__init__()
        self.settings = {"rank": rank, "alpha": alpha, "targets": list(targets)}
        adapters = LoraConfig(r=rank, lora_alpha=cast(int, alpha or rank), target_modules=list(targets))
        self.denoiser = inject_adapter_in_model(adapters, denoiser)  # in place: the denoiser itself
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
        return {"_target_": target, "denoiser": dict(denoiser), **self.settings}

    def folded(self) -> nn.Module:
        """The denoiser with the adapters added to its weights, without a trace of them; this module is used up."""
        from peft.tuners.lora import LoraLayer

        adapted = {name: layer for name, layer in self.denoiser.named_modules() if isinstance(layer, LoraLayer)}
        for name, layer in adapted.items():
            layer.merge()  # W + (alpha / rank) B A
            parent, _, attribute = name.rpartition(".")
            setattr(self.denoiser.get_submodule(parent), attribute, layer.get_base_layer())
        del self.denoiser.peft_config  # the last trace
        return self.denoiser


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Compute as if `module` had no adapters, bit for bit as before them: a frozen reference that is no second copy.

    What trains afterwards is what trained before.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]  # peft sets it, too
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
