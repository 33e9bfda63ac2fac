"""The denoiser of AudioLCM's teacher: a plain stack of LLaMA's blocks."""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from foley.models.dit.hoisting import BlockInputs
from foley.models.dit.model import BlockShape, LatentTransformer, OutputLayer, TransformerBlock
from foley.nn.adaln import AdaLN, ModulatedRMSNorm, ModulationScheme
from foley.nn.feedforward import SwigluFeedForward
from foley.nn.rotary import RotaryEmbedding

_HIDDEN_MULTIPLE = 256  # LLaMA's: matrix products like widths of such multiples


class LlamaTransformer(LatentTransformer):
    """Denoiser over 1-D latents (AudioLCM, Liu et al. 2024, Section 3.2): RMSNorm before each layer, RoPE, SwiGLU.

    The paper leaves open how time and text come in: the time by AdaLN in every block, the text by cross-attention, and
    blocks start open, as in all denoisers of this package.

    Args:
        latent_channels, width, num_heads, context_dim, gradient_checkpointing, guidance_embedding: as for
            `DiffusionTransformer`.
        depth: number of blocks.
        modulation: how the diffusion time reaches the blocks; AdaLN by default.
        feed_forward_ratio: hidden width of the feed-forward layer over D, rounded up to a multiple of 256 as in LLaMA;
            8/3 costs as much as a layer of four times D without a gate.

    Example:
        >>> import torch
        >>> denoiser = LlamaTransformer(latent_channels=8, width=32, depth=2, num_heads=2, context_dim=16)
        >>> denoiser(torch.randn(1, 8, 50), torch.tensor([999]), context=torch.randn(1, 7, 16)).shape
        torch.Size([1, 8, 50])
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        context_dim: int | None,
        modulation: ModulationScheme | None = None,
        feed_forward_ratio: float = 8 / 3,
        gradient_checkpointing: bool = False,
        guidance_embedding: bool = False,
    ) -> None:
        scheme = modulation or AdaLN()
        super().__init__(
            latent_channels,
            width,
            context_dim,
            scheme,
            RotaryEmbedding(width // num_heads),
            gradient_checkpointing=gradient_checkpointing,
            guidance_embedding=guidance_embedding,
        )
        # SwiGLU has three matrices where a plain layer has two: 2/3 of its hidden width costs the same.
        # With D = 1024: 8/3 of it is 2731, and the multiple 2816.
        hidden = _HIDDEN_MULTIPLE * math.ceil(round(feed_forward_ratio * width) / _HIDDEN_MULTIPLE)
        has_context = context_dim is not None
        # No norm of queries and keys: LLaMA has none.
        shape = BlockShape(width, num_heads, hidden, False, has_context, ModulatedRMSNorm, SwigluFeedForward)
        self.stack = nn.ModuleList(TransformerBlock(shape, scheme) for _ in range(depth))
        self.output_layer = OutputLayer(width, latent_channels, not self.prepends_time_token, ModulatedRMSNorm)

    def blocks(self) -> list[TransformerBlock]:
        """All blocks, in order of execution."""
        return cast(list[TransformerBlock], list(self.stack))

    def _run_blocks(self, x: Tensor, inputs: Sequence[BlockInputs], additions: Sequence[Tensor] = ()) -> Tensor:
        for block, own in zip(self.stack, inputs, strict=True):
            x = self._run(block, x, own)
        return x
