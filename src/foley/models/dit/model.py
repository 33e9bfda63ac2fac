"""EzAudio-DiT and its ablation variants (Hai et al. 2024, Section 3.2), from the block to the whole transformer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foley.models.dit.masking import MaskedInput
from foley.nn.adaln import BlockModulation, ModulatedNorm, ModulatedRMSNorm, Modulation, ModulationScheme
from foley.nn.attention import Attention, KeysValues
from foley.nn.embedding import GuidanceEmbedding, LearnedPositions, TimeEmbedding
from foley.nn.feedforward import GatedFeedForward, GegluFeedForward, normal_linear, xavier_linear, zero_linear
from foley.nn.rotary import RotaryEmbedding, RotaryTable


class OutputLayer(nn.Module):
    """Modulated norm, linear to the latent channels and a convolution over time that starts at zero.

    Args:
        width: D.
        latent_channels: C.
        modulated: shift and scale by the time embedding.
        norm: its kind.
    """

    def __init__(
        self,
        width: int,
        latent_channels: int,
        modulated: bool,
        norm: type[ModulatedNorm] | type[ModulatedRMSNorm] = ModulatedNorm,
    ) -> None:
        super().__init__()
        self.norm = norm(width)
        self.modulation = zero_linear(width, 2 * width) if modulated else None
        self.linear = xavier_linear(width, latent_channels)
        self.conv = nn.Conv1d(latent_channels, latent_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def modulate(self, time: Tensor) -> Modulation | None:
        """Shift and scale for times `[B, D]`; None where the time does not modulate."""
        if self.modulation is None:
            return None
        shift, scale = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        return Modulation(shift, 1 + scale, gate=torch.ones_like(scale))

    def forward(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        """Tokens `[B, L, D]` to a latent `[B, C, L]`."""
        latent = self.linear(self.norm(x, modulation))
        return self.conv(latent.transpose(1, 2))


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


@dataclass(frozen=True)
class Conditions:
    """Of one evaluation.

    `static_input`, `[B, L, D]` or broadcastable to it, is what visible latent, mask and positions add to the tokens;
    `output_modulation` is that of the last layer. Where `hoisted` is not empty, it has one entry per block, and the
    blocks compute nothing from time and context.
    """

    static_input: Tensor
    block_inputs: BlockInputs
    output_modulation: Modulation | None
    hoisted: Sequence[HoistedBlock] = ()


class RunConditions:
    """The conditions of a generation, computed once for all its evaluations.

    Args:
        timesteps: `[E]`, those of the evaluations.
        conditions: in all that depends on the time, with one row, or one row per item, for each timestep in turn.
    """

    def __init__(self, timesteps: Tensor, conditions: Conditions) -> None:
        self._timesteps = timesteps
        self._time = conditions.block_inputs.time
        self._rows = torch.arange(len(self._time) // len(timesteps), device=timesteps.device)
        modulations = [_parts(block.modulation) for block in conditions.hoisted]
        parts = [part for modulation in (*modulations, _parts(conditions.output_modulation)) for part in modulation]
        self._table = torch.stack(parts, dim=1) if parts else None
        # Views of the table's first rows: each modulation is kept once.
        self._layout = _fill(conditions, None if self._table is None else self._table[: len(self._rows)])

    def at(self, timestep: Tensor) -> Conditions:
        """The conditions of the evaluation at `timestep [B]`: one of the run's timesteps, the same for all items.

        Raises ValueError for another timestep, on the CPU; elsewhere the check would wait for all work queued.
        """
        # By value and on the device: to look a number up on the host would wait too.
        found = self._timesteps == timestep[0]
        # A fake tensor, with which costs are counted, has no value.
        readable = found.device.type == "cpu" and type(found) is Tensor
        if readable and not (bool(found.any()) and bool((timestep == timestep[0]).all())):
            raise ValueError(f"timestep {timestep.tolist()} is not one of the {len(found)} that were prepared for")
        rows = found.to(torch.uint8).argmax(dim=0, keepdim=True) * len(self._rows) + self._rows
        filled = _fill(self._layout, None if self._table is None else self._table[rows])
        return replace(filled, block_inputs=replace(filled.block_inputs, time=self._time[rows]))


def _fill(layout: Conditions, table: Tensor | None) -> Conditions:
    """`layout` with the modulations of `table [rows, parts, 1, D]`, of which they are views."""
    parts = iter(() if table is None else table.unbind(dim=1))
    hoisted = [HoistedBlock(_take_block(block.modulation, parts), block.keys_values) for block in layout.hoisted]
    return replace(layout, output_modulation=_take(layout.output_modulation, parts), hoisted=hoisted)


def _parts(modulation: BlockModulation | Modulation | None) -> list[Tensor]:
    """All tensors of a modulation, in the order in which `_take` and `_take_block` put them back."""
    if isinstance(modulation, BlockModulation):
        return _parts(modulation.self_attention) + _parts(modulation.feed_forward)
    return [] if modulation is None else [modulation.shift, modulation.factor, modulation.gate]


def _take_block(like: BlockModulation, parts: Iterator[Tensor]) -> BlockModulation:
    return BlockModulation(_take(like.self_attention, parts), _take(like.feed_forward, parts))


def _take(like: Modulation | None, parts: Iterator[Tensor]) -> Modulation | None:
    return None if like is None else Modulation(next(parts), next(parts), next(parts))


class LatentTransformer(nn.Module):
    """Base of the denoisers over 1-D latents; a subclass builds the blocks, then `output_layer`, and runs the blocks.

    Args:
        latent_channels: C.
        width: D.
        context_dim: Dc of the text embeddings; None builds no cross-attention (stage-1 masked pre-training).
        modulation: how the diffusion time reaches the blocks.
        rotary: rotary positions in self-attention; None for none.
        learned_positions: number of learned absolute positions, the longest input in frames; None for none.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        guidance_embedding: add an embedding of the guidance scale to that of the time, as a distilled student needs.
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
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.gradient_checkpointing = gradient_checkpointing
        self.prepends_time_token = modulation.prepends_time_token
        self.masked_input = MaskedInput(latent_channels)
        self.input_projection = xavier_linear(2 * latent_channels + 1, width)
        self.positions = LearnedPositions(learned_positions, width) if learned_positions else None
        self.rotary = rotary
        self.time_embedding = TimeEmbedding(width)
        self.guidance_embedding = GuidanceEmbedding(width) if guidance_embedding else None
        self.context_embedding = _context_embedding(context_dim, width) if context_dim else None
        self.shared_modulation = modulation.build_shared(width)

    def blocks(self) -> Sequence[TransformerBlock]:
        """All blocks, in order of execution."""
        raise NotImplementedError

    def _run_blocks(self, x: Tensor, conditions: Conditions) -> Tensor:
        """Tokens `[B, N, D]` through all blocks; `conditions.hoisted` is empty or has one entry per block."""
        raise NotImplementedError

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
    ) -> Tensor:
        """The prediction `[B, C, L]` for a noisy latent `[B, C, L]` at `timestep [B]`.

        A model held in half precision takes and returns the latent in the latent's own type.

        Args:
            context: text `[B, S, Dc]`, needed (ValueError) by a model with cross-attention, ignored by one without.
            context_mask: `[B, S]`, true = valid.
            frame_mask: `[B, L]`, true = valid; padded frames are not attended to.
            visible: latent `[B, C, L]` of known frames, for masked training and for editing.
            hidden_mask: `[B, L]`, true where the visible latent is hidden and must be generated.
            guidance_scale: w `[B]`, or `[1]` for all items; needed (ValueError) by a model that embeds it, and by no
                other.
            run: what `prepare` made of all of these; they are then not looked at.
        """
        if run is None:
            time, frames = self._embed_time(timestep, guidance_scale), noisy.shape[-1]
            conditions = self._condition(time, frames, context, context_mask, frame_mask, visible, hidden_mask)
        else:
            conditions = run.at(timestep)
        weight = self.input_projection.weight[:, : self.latent_channels]
        x = nn.functional.linear(noisy.transpose(1, 2).to(weight.dtype), weight) + conditions.static_input
        if self.prepends_time_token:
            x = torch.cat([conditions.block_inputs.time.unsqueeze(1).expand(len(x), -1, -1), x], dim=1)
        x = self._run_blocks(x, conditions)
        x = x[:, 1:] if self.prepends_time_token else x
        return self.output_layer(x, conditions.output_modulation).to(noisy.dtype)

    def prepare(
        self,
        timesteps: Tensor,
        num_frames: int,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        visible: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> RunConditions:
        """Everything that the evaluations at `timesteps [E]` of one generation share, for `forward(..., run=...)`.

        All modulations, the context's keys and values, rotary tables and the visible latent's share of the tokens are
        computed here, once. The other arguments are those of `forward`.
        """
        num_scales = 1 if guidance_scale is None else len(guidance_scale)
        scales = None if guidance_scale is None else guidance_scale.repeat(len(timesteps))
        time = self._embed_time(timesteps.repeat_interleave(num_scales), scales)
        conditions = self._condition(time, num_frames, context, context_mask, frame_mask, visible, hidden_mask)
        hoisted = [block.hoist(conditions.block_inputs) for block in self.blocks()]
        return RunConditions(timesteps, replace(conditions, hoisted=hoisted))

    def _embed_time(self, timestep: Tensor, guidance_scale: Tensor | None) -> Tensor:
        """`[B, D]` of diffusion times `[B]` and, in a student, of guidance scales."""
        if (guidance_scale is None) != (self.guidance_embedding is None):
            raise ValueError(
                "this model embeds the guidance scale: give `guidance_scale [B]`"
                if guidance_scale is None
                else "this model does not embed a guidance scale; only a distilled student does (guidance_embedding)"
            )
        time = self.time_embedding(timestep)
        if self.guidance_embedding is not None:
            time = time + self.guidance_embedding(guidance_scale)
        return nn.functional.silu(time)

    def _condition(
        self,
        time: Tensor,
        num_frames: int,
        context: Tensor | None,
        context_mask: Tensor | None,
        frame_mask: Tensor | None,
        visible: Tensor | None,
        hidden_mask: Tensor | None,
    ) -> Conditions:
        num_tokens = num_frames + self.prepends_time_token
        if self.prepends_time_token and frame_mask is not None:
            frame_mask = nn.functional.pad(frame_mask, (1, 0), value=True)
        inputs = BlockInputs(
            time=time,
            shared_modulation=self.shared_modulation(time) if self.shared_modulation is not None else None,
            rotary=self.rotary(num_tokens, time.device, time.dtype) if self.rotary is not None else None,
            frame_mask=_key_mask(frame_mask),
            context=self._embed_context(context),
            context_mask=_key_mask(context_mask),
        )
        static = self._static_input(num_frames, visible, hidden_mask)
        return Conditions(static, inputs, self.output_layer.modulate(time))

    def _static_input(self, num_frames: int, visible: Tensor | None, hidden_mask: Tensor | None) -> Tensor:
        """What the input projection makes of all channels but the noisy ones, and the positions, `[B, L, D]`."""
        weight, bias = self.input_projection.weight[:, self.latent_channels :], self.input_projection.bias
        static = nn.functional.linear(self.masked_input(visible, hidden_mask), weight, bias)
        if self.positions is None:
            return static
        return self.positions(static.expand(-1, num_frames, -1))

    def _embed_context(self, context: Tensor | None) -> Tensor | None:
        if self.context_embedding is None:
            return None
        if context is None:
            raise ValueError("this model has cross-attention: give `context`, or build it with `context_dim: null`")
        return self.context_embedding(context.to(self.input_projection.weight.dtype))

    def _run(
        self,
        block: TransformerBlock,
        x: Tensor,
        inputs: BlockInputs,
        skip: Tensor | None,
        hoisted: HoistedBlock | None,
    ) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(block, x, inputs, skip, hoisted, use_reentrant=False)
            return output
        return cast(Tensor, block(x, inputs, skip, hoisted))


def _context_embedding(context_dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(normal_linear(context_dim, width), nn.SiLU(), normal_linear(width, width))


def _key_mask(mask: Tensor | None) -> Tensor | None:
    """`[B, N]` to `[B, 1, 1, N]`, or None where nothing is masked: attention without a mask is faster.

    Only a mask on the CPU is looked into; to read one from another device would wait for all work queued there.
    """
    readable = mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask is None or (readable and bool(mask.all())):
        return None
    return mask[:, None, None]


class DiffusionTransformer(LatentTransformer):
    """Denoiser over 1-D latents (EzAudio, Hai et al. 2024, Section 3.2).

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
        guidance_embedding: add an embedding of the guidance scale to that of the time, as a distilled student needs.
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
    ) -> None:
        if depth % 2:
            raise ValueError(f"depth must be even, half of it on each side of the mid block; got {depth}")
        super().__init__(
            latent_channels,
            width,
            context_dim,
            modulation,
            RotaryEmbedding(width // num_heads) if rotary else None,
            learned_positions,
            gradient_checkpointing,
            guidance_embedding,
        )
        shape = BlockShape(width, num_heads, int(feed_forward_ratio * width), qk_norm, context_dim is not None)
        half = range(depth // 2)
        self.in_blocks = nn.ModuleList(TransformerBlock(shape, modulation) for _ in half)
        self.mid_block = TransformerBlock(shape, modulation)
        self.out_blocks = nn.ModuleList(
            TransformerBlock(shape, modulation, SkipFusion(width, skip_norm) if long_skips else None) for _ in half
        )
        self.output_layer = OutputLayer(width, latent_channels, modulated=not self.prepends_time_token)

    def blocks(self) -> list[TransformerBlock]:
        """All blocks, in order of execution."""
        return cast(list[TransformerBlock], [*self.in_blocks, self.mid_block, *self.out_blocks])

    def _run_blocks(self, x: Tensor, conditions: Conditions) -> Tensor:
        skips: list[Tensor] = []
        for index, (block, hoisted) in enumerate(zip_longest(self.blocks(), conditions.hoisted)):
            skip = skips.pop() if index > len(self.in_blocks) else None
            x = self._run(block, x, conditions.block_inputs, skip, hoisted)
            if index < len(self.in_blocks):
                skips.append(x)
        return x
