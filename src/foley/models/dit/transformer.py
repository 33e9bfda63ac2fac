"""What all denoisers share: everything around the blocks, for one evaluation or hoisted out of a whole run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foley.models.dit.block import BlockInputs, HoistedBlock, TransformerBlock
from foley.models.dit.conditions import Conditions, RunConditions
from foley.models.dit.masking import MaskedInput
from foley.models.dit.output import OutputLayer
from foley.nn.adaln import ModulationScheme
from foley.nn.embedding import GuidanceEmbedding, LearnedPositions, TimeEmbedding
from foley.nn.linear import normal_linear, xavier_linear
from foley.nn.rotary import RotaryEmbedding


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
