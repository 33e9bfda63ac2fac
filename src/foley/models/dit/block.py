"""The transformer block: three cacheable layers around a residual stream.

A cacheable layer norms, modulates and computes, and returns its output before gate and residual, so that whoever
replaces its `forward` skips all of that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foley.nn.adaln import Modulation, ModulationScheme
from foley.nn.attention import Attention
from foley.nn.feedforward import GegluFeedForward
from foley.nn.linear import xavier_linear
from foley.nn.norm import ModulatedNorm
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


class SelfAttentionLayer(nn.Module):
    """Norm, modulation and self-attention."""

    cacheable_kind = "self_attention"

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm = ModulatedNorm(width)
        self.attention = Attention(width, num_heads, qk_norm)

    def forward(
        self, x: Tensor, modulation: Modulation | None, mask: Tensor | None, rotary: RotaryTable | None
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        return self.attention(self.norm(x, modulation), mask, rotary)


class CrossAttentionLayer(nn.Module):
    """Norms of stream and context, and attention to the context; starts at zero."""

    cacheable_kind = "cross_attention"

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, qk_norm, zero_output=True)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, N, D]` and context `[B, S, D]` to `[B, N, D]`."""
        keys_values = self.attention.keys_values(self.norm_context(context))
        return self.attention.attend(self.norm(x), keys_values, mask)


class FeedForwardLayer(nn.Module):
    """Norm, modulation and GEGLU."""

    cacheable_kind = "feed_forward"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = ModulatedNorm(width)
        self.layer = GegluFeedForward(width, hidden)

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


@dataclass(frozen=True)
class BlockShape:
    """The sizes and switches that all blocks of a model share."""

    width: int
    num_heads: int
    hidden: int
    qk_norm: bool
    cross_attention: bool


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
        self.self_attention = SelfAttentionLayer(shape.width, shape.num_heads, shape.qk_norm)
        self.cross_attention = (
            CrossAttentionLayer(shape.width, shape.num_heads, shape.qk_norm) if shape.cross_attention else None
        )
        self.feed_forward = FeedForwardLayer(shape.width, shape.hidden)

    def forward(self, x: Tensor, inputs: BlockInputs, skip: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if self.skip is not None:
            x = self.skip(x, skip)
        modulation = self.modulation(inputs.time, inputs.shared_modulation)
        attended = self.self_attention(x, modulation.self_attention, inputs.frame_mask, inputs.rotary)
        x = _add_gated(x, attended, modulation.self_attention)
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, inputs.context, inputs.context_mask)
        return _add_gated(x, self.feed_forward(x, modulation.feed_forward), modulation.feed_forward)


def _add_gated(x: Tensor, output: Tensor, modulation: Modulation | None) -> Tensor:
    return x + output if modulation is None else torch.addcmul(x, modulation.gate, output)
