"""The self-attention layers of AudioLDM2's U-Net in diffusers, and ways to change them for a while.

The models of diffusers take longer to import than torch, so they are imported where such a U-Net is looked for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention, AttnProcessor
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

Attend = Callable[["Attention", Tensor], Tensor]
"""Self-attention, with the weights of the given layer, of tokens `[B, N, D]` to `[B, N, D]`."""


@dataclass(frozen=True)
class UNetSelfAttention:
    """One self-attention layer: its dotted name inside the U-Net, and the modules around it."""

    name: str
    attention: "Attention"
    block: "BasicTransformerBlock"
    transformer: "Transformer2DModel"


def find_self_attention(denoiser: nn.Module, blocks: Sequence[str]) -> list[UNetSelfAttention]:
    """The self-attention layers in the named blocks ("down_blocks.1") of the U-Net that `denoiser` is or has.

    That is AudioLDM2's, or that of AudioLDM and MusicLDM, which diffusers has for images too. A transformer without
    text has two of them: there `attn2` attends to the tokens themselves as well.

    Raises:
        ValueError: there is not exactly one such U-Net, or it has no such block, or that has no self-attention.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel

    kinds = (AudioLDM2UNet2DConditionModel, UNet2DConditionModel)
    unets: list[Any] = [module for module in denoiser.modules() if isinstance(module, kinds)]
    if len(unets) != 1:
        raise ValueError(
            f"{type(denoiser).__name__} holds {len(unets)} AudioLDM2UNet2DConditionModel or UNet2DConditionModel, and "
            "this accelerator needs exactly one: it works on models with a frequency axis; for waveform latents take "
            "accel=local_global"
        )
    layers: list[UNetSelfAttention] = []
    for name, module in unets[0].named_modules():
        # With the dot: `down_blocks.1` is not the beginning of `down_blocks.10`.
        if isinstance(module, Transformer2DModel) and any(name.startswith(f"{block}.") for block in blocks):
            layers += _of_transformer(name, module)
    missing = [block for block in blocks if not any(layer.name.startswith(f"{block}.") for layer in layers)]
    if missing:
        present = [f"{side}.{i}" for side in ("down_blocks", "up_blocks") for i in range(len(getattr(unets[0], side)))]
        raise ValueError(f"no self-attention in {missing} of the U-Net, whose blocks are mid_block and {present}")
    return layers


def _of_transformer(name: str, transformer: "Transformer2DModel") -> Iterator[UNetSelfAttention]:
    # A ModuleList, which is typed as modules.
    blocks = cast(Iterable["BasicTransformerBlock"], transformer.transformer_blocks)
    for index, block in enumerate(blocks):
        for part in ("attn1", "attn2"):
            attention = getattr(block, part)
            # attn2 may be absent, attend to a text, or be a second self-attention.
            if attention is not None and not attention.is_cross_attention:
                yield UNetSelfAttention(f"{name}.transformer_blocks.{index}.{part}", attention, block, transformer)


class BorrowedProcessor:
    """A diffusers attention processor that lets `attend` do the work, in the place of the layer's own."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: "Attention",  # names of arguments are those that diffusers calls with
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; raises ValueError for a context or a mask, which AudioLDM2 never gives here."""
        if encoder_hidden_states is not None or attention_mask is not None:
            given = "encoder_hidden_states" if encoder_hidden_states is not None else "attention_mask"
            raise ValueError(f"sparse self-attention got {given}: run the U-Net without it, or without the accelerator")
        return self._attend(attn, hidden_states)


@contextmanager
def replaced_attention(
    layers: Sequence[UNetSelfAttention], wrap: Callable[[UNetSelfAttention], Attend]
) -> Iterator[None]:
    """Give every layer the processor that `wrap` makes for it inside the context, and its own again on any exit.

    Raises:
        RuntimeError: a layer's processor is replaced already.
    """
    taken = [layer.name for layer in layers if isinstance(layer.attention.processor, BorrowedProcessor)]
    if taken:
        raise RuntimeError(
            f"the attention of {taken[0]!r} ({len(taken)} of {len(layers)} layers) is replaced already: LiteFocus and "
            "Token Merging exclude each other; leave the other's `attach` context first"
        )
    with ExitStack() as stack:
        for layer in layers:
            processor = cast("AttnProcessor", BorrowedProcessor(wrap(layer)))  # diffusers itself takes any callable
            stack.callback(layer.attention.set_processor, layer.attention.processor)  # its own, to be put back
            layer.attention.set_processor(processor)
        yield


FeatureMapSizes = Mapping[nn.Module, tuple[int, int]]
"""Frames and frequencies of the feature map `[B, C, T, F]` that a transformer was last called with.

It flattens them to tokens `t * F + f`."""


@contextmanager
def watched_feature_maps(layers: Sequence[UNetSelfAttention]) -> Iterator[FeatureMapSizes]:
    """Keeps the sizes up to date inside the context, for the transformers of `layers`."""
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frames, frequencies = first_input(args, kwargs).shape[-2:]  # of [B, C, T, F]
        sizes[module] = frames, frequencies

    with ExitStack() as stack:
        # Each once, however many layers it holds.
        for transformer in dict.fromkeys(layer.transformer for layer in layers):
            stack.callback(transformer.register_forward_pre_hook(note_size, with_kwargs=True).remove)
        yield sizes


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The `hidden_states` of a call, given by position or by name."""
    tensor: Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor
