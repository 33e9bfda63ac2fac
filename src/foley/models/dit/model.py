"""EzAudio-DiT and its ablation variants (Hai et al. 2024, Section II-B and Fig. 1), from the block to the whole.

    noisy latent   visible latent, mask       timestep     text
         |                |                      |           |
         +--- project ----+                 sinusoids, MLP  MLP
                 |                               |           |
      tokens [B, N, D]                     time [B, D]  context [B, S, D]
                 |                               |           |
         depth / 2 in-blocks  <------------------+-----------+     each block:
          |      |                               |           |       [long skip: x = W norm([x, skip])]
          |   mid block  <-----------------------+-----------+       x += gate * self-attention(modulate(norm(x)))
          |      |                               |           |       x += cross-attention(norm(x), norm(context))
          +-> depth / 2 out-blocks  <------------+-----------+       x += gate * feed-forward(modulate(norm(x)))
         (last in, first out)                    |
                 |                               |
         norm, modulate, linear, conv <----------+
                 |
       prediction [B, C, L]

B batch, C latent channels, L latent frames, N tokens (L, or L + 1 with a time token), D width, S text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foley.models.dit.hoisting import BlockInputs, Conditions, Hoistable, RunConditions
from foley.models.dit.masking import MaskedInput, SlicedLinear
from foley.nn.adaln import ModulatedNorm, ModulatedRMSNorm, Modulation, ModulationScheme
from foley.nn.attention import Attention, KeysValues, key_mask
from foley.nn.embedding import ContextEmbedding, GuidanceEmbedding, LearnedPositions, LengthEmbedding, TimeEmbedding
from foley.nn.feedforward import GatedFeedForward, GegluFeedForward, xavier_linear, zero_linear
from foley.nn.norm import LayerNorm, without_autocast
from foley.nn.rotary import RotaryEmbedding, RotaryTable

# ---------------------------------------------------------------- the block

# A layer that names its `cacheable_kind` may be left out by an accelerator, which puts an earlier output of the same
# layer in its place. So its `forward` is all that it costs; gate and residual sum stay outside, in the block.


@dataclass(frozen=True)
class BlockShape:
    """The sizes and switches that all blocks of a model share, and the kinds of norm and feed-forward layer."""

    width: int  # D
    num_heads: int  # H
    hidden: int  # of the feed-forward layer
    qk_norm: bool
    cross_attention: bool
    norm: type[ModulatedNorm] | type[ModulatedRMSNorm] = ModulatedNorm
    feed_forward: type[GatedFeedForward] = GegluFeedForward


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
    """Norms of stream and context, and attention to the context.

    Its output starts at zero, so that a model whose masked pre-training knew no text goes on where it stopped
    (Section II-C). The time does not modulate it.
    """

    cacheable_kind = "cross_attention"

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm = shape.norm(shape.width)
        self.norm_context = shape.norm(shape.width)
        self.attention = Attention(shape.width, shape.num_heads, shape.qk_norm, zero_output=True)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of a context `[B, S, D]`, whatever the stream and the time: each `[B, H, S, head_dim]`."""
        return self.attention.keys_values(self.norm_context(context))

    def forward(self, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """`[B, N, D]` and a context `[B, S, D]`, or its keys and values, to `[B, N, D]`."""
        keys_values = self.keys_values(context) if isinstance(context, Tensor) else context  # or hoisted
        # Unrotated: places of words and frames do not compare.
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
    """Joins the stream with an in-block's output: `W norm([x, skip])` (Fig. 1b).

    The skip carries detail of the input's many channels past the middle of the stack; the norm keeps it stable.
    """

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(2 * width) if normed else nn.Identity()  # over both halves together
        self.linear = xavier_linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Two `[B, N, D]` to `[B, N, D]`."""
        return self.linear(self.norm(torch.cat([x, skip], dim=-1)))  # [B, N, 2 D] to [B, N, D]


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

    def forward(self, x: Tensor, inputs: BlockInputs, skip: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; `skip [B, N, D]` is the output of the matching in-block."""
        # Long skip, in the out-blocks of EzAudio-DiT.
        if self.skip is not None:
            x = self.skip(x, skip)
        # AdaLN: shift, factor and gate of the two modulated layers, each [B, 1, D].
        modulation = inputs.modulation
        if modulation is None:  # no run has computed it beforehand
            modulation = self.modulation(inputs.time, inputs.shared_modulation)
        # Frames hear each other.
        attended = self.self_attention(x, modulation.self_attention, inputs.frame_mask, inputs.rotary)
        x = _add_gated(x, attended, modulation.self_attention)
        # Frames hear the text; keys and values are the text's.
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, inputs.context, inputs.context_mask)
        # Each frame by itself.
        return _add_gated(x, self.feed_forward(x, modulation.feed_forward), modulation.feed_forward)

    def hoist(self, inputs: BlockInputs) -> BlockInputs:
        """Inputs that hold the modulation for each of the times `[R, D]`, and the context's keys and values."""
        modulation, context = self.modulation(inputs.time, inputs.shared_modulation), inputs.context
        if self.cross_attention is not None and isinstance(context, Tensor):
            context = self.cross_attention.keys_values(context)
        return replace(inputs, time=None, shared_modulation=None, modulation=modulation, context=context)


def _add_gated(x: Tensor, output: Tensor, modulation: Modulation | None) -> Tensor:
    # x + gate * output: [B, N, D] + [B, 1, D] * [B, N, D]
    return x + output if modulation is None else torch.addcmul(x, modulation.gate, output)


# ---------------------------------------------------------------- around the blocks


class OutputLayer(nn.Module):
    """Modulated norm, linear to the latent channels and a convolution over time.

    The convolution starts at zero, so that the model begins by predicting the mean of what it learns to predict.

    Args:
        width: D.
        latent_channels: C.
        modulated: shift and scale by the time embedding.
        norm: its kind.
        xavier: start the convolution as Xavier's, as the published code does.
    """

    def __init__(
        self,
        width: int,
        latent_channels: int,
        modulated: bool,
        norm: type[ModulatedNorm] | type[ModulatedRMSNorm] = ModulatedNorm,
        xavier: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm(width)
        self.modulation = zero_linear(width, 2 * width) if modulated else None  # shift and scale alone
        self.linear = xavier_linear(width, latent_channels)
        # Each frame and its two neighbours.
        self.conv = nn.Conv1d(latent_channels, latent_channels, kernel_size=3, padding=1)
        nn.init.xavier_uniform_(self.conv.weight) if xavier else nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def modulate(self, time: Tensor) -> Modulation | None:
        """Shift and scale, each `[B, 1, D]`, for times `[B, D]`; None where the time does not modulate."""
        if self.modulation is None:
            return None
        shift, scale = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        return Modulation(shift, 1 + scale, gate=torch.ones_like(scale))  # no residual, hence nothing to gate

    def forward(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        """Tokens `[B, L, D]` to a latent `[B, C, L]`."""
        # In the type of the weights, autocast or not: what is rounded here, no later layer makes good.
        with without_autocast(x):
            latent = self.linear(self.norm(x.to(self.conv.weight.dtype), modulation))  # [B, L, C]
            return self.conv(latent.transpose(1, 2))


class LatentTransformer(Hoistable):
    """Base of the denoisers over 1-D latents; a subclass builds the blocks, then `output_layer`, and runs the blocks.

    Args:
        rotary: rotary positions in self-attention; None for none.
        latent_channels, width, context_dim, modulation, learned_positions: as for `DiffusionTransformer`.
        gradient_checkpointing, guidance_embedding, length_embedding: as there.
    """

    output_layer: OutputLayer

    def __init__(
        self,
        latent_channels: int,
        width: int,
        context_dim: int | None,
        modulation: ModulationScheme,
        rotary: RotaryEmbedding | None,
        learned_positions: int | None = None,
        gradient_checkpointing: bool = False,
        guidance_embedding: bool = False,
        length_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.gradient_checkpointing = gradient_checkpointing
        self.prepends_time_token = modulation.prepends_time_token
        # The latent, in one linear layer: the noisy one's C channels, the visible one's C, and the mask.
        self.masked_input = MaskedInput(latent_channels)
        self.input_projection = xavier_linear(2 * latent_channels + 1, width, kind=SlicedLinear)
        self.positions = LearnedPositions(learned_positions, width) if learned_positions else None
        self.rotary = rotary
        # The diffusion time; in a student the guidance scale; and how long the clip is, where clips differ.
        self.time_embedding = TimeEmbedding(width)
        self.guidance_embedding = GuidanceEmbedding(width) if guidance_embedding else None
        self.length_embedding = LengthEmbedding(width) if length_embedding else None
        # The text, and what all blocks' modulations have in common.
        self.context_embedding = ContextEmbedding(context_dim, width) if context_dim else None
        self.shared_modulation = modulation.build_shared(width)

    def blocks(self) -> Sequence[TransformerBlock]:
        """All blocks, in order of execution."""
        raise NotImplementedError

    def _run_blocks(self, x: Tensor, inputs: Sequence[BlockInputs], additions: Sequence[Tensor] = ()) -> Tensor:
        """Tokens `[B, N, D]` through all blocks, each with its own inputs; `additions` are those of `_additions`."""
        raise NotImplementedError

    def _additions(self, noisy: Tensor, conditions: Conditions) -> Sequence[Tensor]:
        """What is added to the long skips, `[B, N, D]` for each in-block: nothing, but under a ControlNet."""
        return ()

    def forward(
        self,
        noisy: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        visible: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        run: RunConditions | None = None,
        **more: Tensor | None,
    ) -> Tensor:
        """The prediction `[B, C, L]` for a noisy latent `[B, C, L]` at `timestep [B]`.

        A model held in half precision takes and returns the latent in the latent's own type.

        Args:
            context: text `[B, S, Dc]`, needed (ValueError) by a model with cross-attention, ignored by one without.
            context_mask: `[B, S]`, true = valid.
            frame_mask: `[B, L]`, true = valid; padded frames are not attended to.
            visible: latent `[B, C, L]` of known frames, for masked training and for editing.
            hidden_mask: `[B, L]`, true where the visible latent is hidden and must be generated.
            guidance_scale: what a student embeds, `[B]`, or `[1]` for all items; needed (ValueError) by a model that
                embeds it, and by no other.
            run: what `prepare` made of all of these; they are then not looked at.
            more: what else the `condition` of a subclass takes.
        """
        if run is None:
            inputs = context, context_mask, frame_mask, visible, hidden_mask, guidance_scale
            conditions = self.condition(timestep, noisy.shape[-1], *inputs, **more)
        else:
            conditions = run.at(timestep)
        x = self._project_noisy(noisy) + conditions.static_input  # [B, L, D]
        if self.prepends_time_token:
            x = torch.cat([conditions.time.unsqueeze(1).expand(len(x), -1, -1), x], dim=1)  # [B, L + 1, D]
        x = self._run_blocks(x, conditions.blocks, self._additions(noisy, conditions))  # [B, N, D]
        # The time token has done its work: only frames become a latent.
        x = x[:, 1:] if self.prepends_time_token else x
        return self.output_layer(x, conditions.output_modulation).to(noisy.dtype)

    def condition(
        self,
        timestep: Tensor,
        num_frames: int,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        visible: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Conditions:
        """All that an evaluation over L frames makes of anything but the noisy latent; arguments as `forward`'s."""
        time = self._embed_time(timestep, guidance_scale, num_frames, frame_mask)
        num_tokens = num_frames + int(self.prepends_time_token)  # an export knows no sum of a size and a truth
        if self.prepends_time_token and frame_mask is not None:  # the time is attended to by all
            frame_mask = nn.functional.pad(frame_mask, (1, 0), value=True)
        inputs = BlockInputs(
            time=time,
            shared_modulation=self.shared_modulation(time) if self.shared_modulation is not None else None,
            rotary=self.rotary(num_tokens, time.device, time.dtype) if self.rotary is not None else None,
            frame_mask=key_mask(frame_mask, time.dtype),
            context=self._embed_context(context),
            context_mask=key_mask(context_mask, time.dtype),
        )
        static = self._static_input(num_frames, visible, hidden_mask)
        # One and the same inputs for every block; `prepare` makes each its own of them.
        return Conditions(static, time, [inputs] * len(self.blocks()), self.output_layer.modulate(time))

    # The input projection is one matrix over the channels [noisy C, visible C, mask 1], multiplied in two parts:
    # W [noisy, visible, mask] + b = W_noisy noisy + (W_rest [visible, mask] + b). Only the first changes between steps.

    def _project_noisy(self, noisy: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, L, D]`."""
        weight = self.input_projection.weight[:, : self.latent_channels]
        return nn.functional.linear(noisy.transpose(1, 2).to(weight.dtype), weight)

    def _static_input(self, num_frames: int, visible: Tensor | None, hidden_mask: Tensor | None) -> Tensor:
        """What the projection makes of the other channels, and the positions: `[B, L, D]` or broadcastable to it."""
        # [D, C + 1] and [D].
        weight, bias = self.input_projection.weight[:, self.latent_channels :], self.input_projection.bias
        static = nn.functional.linear(self.masked_input(visible, hidden_mask), weight, bias)  # [B, L, D], or [1, 1, D]
        if self.positions is None:
            return static
        return self.positions(static.expand(-1, num_frames, -1))  # frames differ from here on

    def _embed_time(
        self, timestep: Tensor, guidance_scale: Tensor | None, num_frames: int, frame_mask: Tensor | None
    ) -> Tensor:
        """`[B, D]` of diffusion times `[B]` and, where the model embeds them, of guidance scales and of lengths."""
        if (guidance_scale is None) != (self.guidance_embedding is None):
            raise ValueError(
                "this model embeds the guidance scale: give `guidance_scale [B]`"
                if guidance_scale is None
                else "this model does not embed a guidance scale; only a distilled student does (guidance_embedding)"
            )
        time = self.time_embedding(timestep)
        if self.guidance_embedding is not None:
            time = time + self.guidance_embedding(guidance_scale)
        if self.length_embedding is not None:
            frames = timestep.new_full((1,), num_frames) if frame_mask is None else frame_mask.sum(dim=1)
            time = time + self.length_embedding(frames)
        return nn.functional.silu(time)  # here once, since every projection of it would begin with it

    def _embed_context(self, context: Tensor | None) -> Tensor | None:
        """Text `[B, S, Dc]` to `[B, S, D]`; raises ValueError where there is none and the model wants it."""
        if self.context_embedding is None:
            return None
        if context is None:
            raise ValueError("this model has cross-attention: give `context`, or build it with `context_dim: null`")
        return self.context_embedding(context.to(self.input_projection.weight.dtype))  # [B, S, Dc] to [B, S, D]

    def _run(self, block: nn.Module, x: Tensor, inputs: BlockInputs, skip: Tensor | None = None) -> Tensor:
        """One block; where gradients are checkpointed it keeps only its inputs for the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Not re-entrant: the other kind wants a tensor that needs a gradient among the inputs.
            output: Tensor = checkpoint(block, x, inputs, skip, use_reentrant=False)
            return output
        return cast(Tensor, block(x, inputs, skip))


# ---------------------------------------------------------------- EzAudio-DiT


class DiffusionTransformer(LatentTransformer):
    """Denoiser over 1-D latents (EzAudio, Hai et al. 2024, Section II-B).

    Args:
        latent_channels: C.
        width: D.
        depth: even; the model has `depth + 1` blocks: depth / 2 in-blocks, a mid block, depth / 2 out-blocks.
        num_heads: H, for self-attention and cross-attention.
        context_dim: Dc of the text embeddings; None builds no cross-attention (stage-1 masked pre-training).
        modulation: how the diffusion time reaches the blocks.
        feed_forward_ratio: hidden width of the feed-forward layer over D.
        qk_norm: LayerNorm on queries and keys.
        long_skips: out-block i joins the output of the matching in-block.
        skip_norm: LayerNorm on what a long skip joins.
        rotary: rotary positions in self-attention.
        learned_positions: number of learned absolute positions, the longest input in frames; None for none.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        xavier_output: start the last convolution as Xavier's and not at zero.
        guidance_embedding: add an embedding of the guidance scale to that of the time, as a distilled student needs.
        length_embedding: add one of the number of valid frames, too, for clips of many lengths.

    Raises:
        ValueError: where `depth` is odd, or `width` does not divide into heads.

    Example:
        >>> import torch
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(
        ...     latent_channels=8, width=32, depth=2, num_heads=2, context_dim=16, modulation=AdaLNSola(rank=4, alpha=4)
        ... )
        >>> noisy, context = torch.randn(2, 8, 50), torch.randn(2, 7, 16)  # 50 frames, 7 tokens of text
        >>> denoiser(noisy, torch.tensor([999, 10]), context).shape
        torch.Size([2, 8, 50])

        A generation prepares once what its evaluations share:

        >>> run = denoiser.prepare(torch.tensor([999, 500]), num_frames=50, context=context)
        >>> denoiser(noisy, torch.tensor([500, 500]), run=run).shape
        torch.Size([2, 8, 50])
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        context_dim: int | None,
        modulation: ModulationScheme,
        feed_forward_ratio: float = 4.0,
        qk_norm: bool = True,
        long_skips: bool = True,
        skip_norm: bool = True,
        rotary: bool = True,
        learned_positions: int | None = None,
        gradient_checkpointing: bool = False,
        guidance_embedding: bool = False,
        xavier_output: bool = False,
        length_embedding: bool = False,
    ) -> None:
        if depth % 2:
            raise ValueError(f"depth must be even, half of it on each side of the mid block; got {depth}")
        positions = RotaryEmbedding(width // num_heads) if rotary else None, learned_positions
        options = gradient_checkpointing, guidance_embedding, length_embedding
        super().__init__(latent_channels, width, context_dim, modulation, *positions, *options)
        shape = BlockShape(width, num_heads, int(feed_forward_ratio * width), qk_norm, context_dim is not None)
        half = range(depth // 2)
        self.in_blocks = nn.ModuleList(TransformerBlock(shape, modulation) for _ in half)
        self.mid_block = TransformerBlock(shape, modulation)
        self.out_blocks = nn.ModuleList(
            TransformerBlock(shape, modulation, SkipFusion(width, skip_norm) if long_skips else None) for _ in half
        )
        self.output_layer = OutputLayer(
            width, latent_channels, modulated=not self.prepends_time_token, xavier=xavier_output
        )

    def blocks(self) -> list[TransformerBlock]:
        """All blocks, in order of execution."""
        return cast(list[TransformerBlock], [*self.in_blocks, self.mid_block, *self.out_blocks])

    def _run_blocks(self, x: Tensor, inputs: Sequence[BlockInputs], additions: Sequence[Tensor] = ()) -> Tensor:
        each = iter(inputs)
        skips: list[Tensor] = []  # spelt so that the whole can be compiled as one graph
        for block in self.in_blocks:
            x = self._run(block, x, next(each))
            skips.append(x)  # [B, N, D], in order
        x = self._run(self.mid_block, x, next(each))
        for block in self.out_blocks:
            skip = skips.pop()  # the innermost pair first, as in a U-Net
            skip = skip + additions[len(skips)] if additions else skip
            x = self._run(block, x, next(each), skip)
        return x
