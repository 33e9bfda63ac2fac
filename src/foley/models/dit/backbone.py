"""EzAudio-DiT and its ablation variants: one transformer, put together from the parts it is given."""

from itertools import zip_longest
from typing import cast

from torch import Tensor, nn

from foley.models.dit.block import BlockShape, SkipFusion, TransformerBlock
from foley.models.dit.conditions import Conditions
from foley.models.dit.output import OutputLayer
from foley.models.dit.transformer import LatentTransformer
from foley.nn.adaln import ModulationScheme
from foley.nn.rotary import RotaryEmbedding


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
