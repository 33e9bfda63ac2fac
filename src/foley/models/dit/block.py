"""The transformer block: three cacheable layers around a residual stream.

A cacheable layer norms, modulates and computes, and returns its output before gate and residual, so that whoever
replaces its `forward` skips all of that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foley.nn.adaln import BlockModulation, Modulation, ModulationScheme
from foley.nn.attention import Attention, KeysValues
from foley.nn.feedforward import GatedFeedForward, GegluFeedForward
from foley.nn.linear import xavier_linear
from foley.nn.norm import ModulatedNorm, ModulatedRMSNorm
from foley.nn.rotary import RotaryTable


@dataclass(frozen=True)
class BlockInputs:
    """What all blocks of one evaluation share.

    `time [B, D]` and `shared_modulation [B, 6 D]` come from the diffusion time; `context [B, S, D]` is the projected
    text. Masks are true where a key may be attended to, `[B, 1, 1, N]` and `[B, 1, 1, S]`.
    """

    time: Tensor
    shared_modulation: Tensor | None = None
    rotary: RotaryTable | None = None
    frame_mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None


@dataclass(frozen=True)
class BlockShape:
    """The sizes and switches that all blocks of a model share, and the kinds of norm and feed-forward layer."""

    width: int
    num_heads: int
    hidden: int
    qk_norm: bool
    cross_attention: bool
    norm: type[ModulatedNorm] | type[ModulatedRMSNorm] = ModulatedNorm
    feed_forward: type[GatedFeedForward] = GegluFeedForward


@dataclass(frozen=True)
class HoistedBlock:
    """What one block makes of time and text alone: computed once for a whole generation."""

    modulation: BlockModulation
    keys_values: KeysValues | None


class SelfAttentionLayer(nn.Module):
    """Norm, modulation and self-attention."""

    cacheable_kind = "self_attention"

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm = shape.norm(shape.width)
        self.attention = Attention(shape.width, shape.num_heads, shape.qk_norm)

    def forward(
        self, x: Tensor, modulation: Modulation | None, mask: Tensor | None, rotary: RotaryTable | None
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return self.attention(self.norm(x, modulation), mask, rotary)


class CrossAttentionLayer(nn.Module):
    """Norms of stream and context, and attention to the context; starts at zero."""

    cacheable_kind = "cross_attention"

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm = shape.norm(shape.width)
        self.norm_context = shape.norm(shape.width)
        self.attention = Attention(shape.width, shape.num_heads, shape.qk_norm, zero_output=True)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of a context `[B, S, D]`, whatever the stream and the time."""
        return self.attention.keys_values(self.norm_context(context))

    def forward(self, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """`[B, N, D]` and a context `[B, S, D]`, or its keys and values, to `[B, N, D]`."""
        keys_values = self.keys_values(context) if isinstance(context, Tensor) else context
        return self.attention.attend(self.norm(x), keys_values, mask)


class FeedForwardLayer(nn.Module):
    """Norm, modulation and the gated feed-forward layer."""

    cacheable_kind = "feed_forward"

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm = shape.norm(shape.width)
        self.layer = shape.feed_forward(shape.width, shape.hidden)

    def forward(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return self.layer(self.norm(x, modulation))


class SkipFusion(nn.Module):
    """Joins the stream with an earlier block's output: `W norm([x, skip])` (EzAudio, Section 3.2)."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width) if normed else nn.Identity()
        self.linear = xavier_linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Two `[B, N, D]` to `[B, N, D]`."""
        return self.linear(self.norm(torch.cat([x, skip], dim=-1)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, after an optional skip fusion.

    Args:
        shape: sizes shared by all blocks.
        scheme: builds the block's modulation.
        skip: joins a long skip; None for blocks without one.
    """

    def __init__(self, shape: BlockShape, scheme: ModulationScheme, skip: SkipFusion | None = None) -> None:
        super().__init__()
        self.skip = skip
        self.modulation = scheme.build_block(shape.width)
        self.self_attention = SelfAttentionLayer(shape)
        self.cross_attention = CrossAttentionLayer(shape) if shape.cross_attention else None
        self.feed_forward = FeedForwardLayer(shape)

    def hoist(self, inputs: BlockInputs) -> HoistedBlock:
        """Modulation for each of the times `inputs.time [E, D]`, and the context's keys and values."""
        modulation = self.modulation(inputs.time, inputs.shared_modulation)
        if self.cross_attention is None or inputs.context is None:
            return HoistedBlock(modulation, None)
        return HoistedBlock(modulation, self.cross_attention.keys_values(inputs.context))

    def forward(
        self, x: Tensor, inputs: BlockInputs, skip: Tensor | None = None, hoisted: HoistedBlock | None = None
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; what is `hoisted` is not computed again."""
        if self.skip is not None:
            x = self.skip(x, skip)
        modulation = hoisted.modulation if hoisted else self.modulation(inputs.time, inputs.shared_modulation)
        attended = self.self_attention(x, modulation.self_attention, inputs.frame_mask, inputs.rotary)
        x = _add_gated(x, attended, modulation.self_attention)
        if self.cross_attention is not None:
            context = hoisted.keys_values if hoisted else inputs.context
            x = x + self.cross_attention(x, context, inputs.context_mask)
        return _add_gated(x, self.feed_forward(x, modulation.feed_forward), modulation.feed_forward)


def _add_gated(x: Tensor, output: Tensor, modulation: Modulation | None) -> Tensor:
    return x + output if modulation is None else torch.addcmul(x, modulation.gate, output)
