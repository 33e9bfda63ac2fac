"""Our denoisers as a transformer of diffusers, so that what hooks into those runs on weights trained here.

The caches of diffusers and of cache-dit look for one list of blocks that hand hidden states to each other, and for
attention of diffusers' classes. `AsTransformer` is that around a denoiser of ours: the same modules, the same numbers.
Long skips go from block to block beside the stream, since cache-dit calls all blocks as if they were one.
"""

import copy
from collections.abc import Sequence
from typing import Any

from diffusers import CacheMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

ATTENTION = ("self_attention", "cross_attention")
LAYERS = (*ATTENTION, "feed_forward")  # below `transformer_blocks.<i>.block`


class AsBlock(nn.Module):
    """A block of ours behind the signature that hooks of diffusers expect.

    Args:
        block: called `block(x, inputs, skip)`.
        index: its place in the stack.
        partner: that of the block whose output its long skip joins; None where it joins none.
    """

    def __init__(self, block: nn.Module, index: int, partner: int | None) -> None:
        super().__init__()
        self.block, self.index, self.partner = block, index, partner
        for name in ATTENTION:
            if (layer := getattr(block, name, None)) is not None:
                # An attention of diffusers in name alone: its hooks ask for the class, and replace the forward.
                own: Any = type(layer)
                kind = {"is_cross_attention": name == "cross_attention"}
                layer.__class__ = type(own.__name__, (own, AttentionModuleMixin), kind)

    def forward(self, hidden_states: Tensor, inputs: Sequence[Any], skips: dict[int, Tensor]) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; `inputs` are those of all blocks, `skips` the outputs of those that have run."""
        skip = None if self.partner is None else skips[self.partner]
        skips[self.index] = output = self.block(hidden_states, inputs[self.index], skip)
        return output


class AsTransformer(nn.Module, CacheMixin):  # type: ignore[misc]
    """A copy of one of our denoisers, with one list of `transformer_blocks` and `enable_cache` of diffusers.

    Example:
        >>> import torch
        >>> from foley.models.dit.model import DiffusionTransformer
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval()
        >>> noisy, timestep, text = torch.randn(1, 4, 20), torch.tensor([500]), torch.randn(1, 3, 8)
        >>> same = AsTransformer(denoiser)(noisy, timestep, text, return_dict=False)[0]
        >>> torch.equal(same, denoiser(noisy, timestep, text))
        True
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        denoiser = copy.deepcopy(denoiser)  # hooks leave their wrappers behind
        blocks = denoiser.blocks()
        last = len(blocks) - 1  # block i of the second half joins the output of block N - 1 - i
        self.transformer_blocks = nn.ModuleList(
            AsBlock(block, index, last - index if getattr(block, "skip", None) is not None else None)
            for index, block in enumerate(blocks)
        )
        self.denoiser = denoiser
        self.latent_channels: int = denoiser.latent_channels
        # Only the stack of blocks is theirs to call; embeddings, norms and the projection out stay as they are.
        denoiser._run_blocks = self._run_blocks
        # Without it hooks of diffusers do not know which output goes to the next block.
        TransformerBlockRegistry.register(AsBlock, TransformerBlockMetadata(return_hidden_states_index=0))

    def _run_blocks(self, x: Tensor, inputs: Sequence[Any], additions: Sequence[Tensor] = ()) -> Tensor:
        skips: dict[int, Tensor] = {}
        for block in self.transformer_blocks:
            x = block(x, inputs=inputs, skips=skips)
        return x

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The prediction `[B, C, L]` of a noisy latent `[B, C, L]`, in the form that diffusers' transformers give."""
        prediction = self.denoiser(hidden_states, timestep, encoder_hidden_states, encoder_attention_mask)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)
