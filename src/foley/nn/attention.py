"""Multi-head attention around a swappable core, which accelerators exchange for one that computes less."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foley.nn.feedforward import xavier_linear, zero_linear
from foley.nn.norm import LayerNorm
from foley.nn.rotary import RotaryTable, apply_rotary

AttentionCore = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""`(query, key, value, mask)`, each `[B, H, N, head_dim]`, to `[B, H, N, head_dim]`.

The mask, of `key_mask`, is added to the scores, to which `[B, H, N_query, N_key]` it broadcasts; None attends to
everything."""


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of an attention layer, each `[B, H, N, head_dim]`."""


def dense_core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention over all keys."""
    # The backward pass of the CPU kernel is several times slower in bfloat16 than in float32.
    if query.device.type == "cpu" and query.requires_grad and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            mask = None if mask is None else mask.float()
            attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
            return attended.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


_MASK_ALIGNMENT = 8  # numbers: rows of 16 bytes in half precision


def key_mask(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What attention adds to its scores where only `valid [B, N]` keys count: 0 or minus infinity, `[B, 1, 1, N]`.

    Made once for all layers. In this form the memory-efficient kernel of CUDA takes it as it is, broadcast over heads
    and queries: a boolean mask would be converted, and one of unaligned rows padded, in every layer. None, where
    nothing is masked, reaches the flash kernel. Only a mask on the CPU is looked into for that; to read one from
    another device would wait for all work queued there.

    >>> key_mask(torch.tensor([[True, True, False]]), torch.float32).flatten()
    tensor([0., 0., -inf])
    """
    if valid is None:
        return None
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all()):
        return None
    masked = ~F.pad(valid, (0, -valid.shape[1] % _MASK_ALIGNMENT))  # what is added at the end is cut away again
    scores = torch.zeros_like(masked, dtype=dtype).masked_fill(masked, float("-inf"))
    return scores[:, None, None, : valid.shape[1]]


class Attention(nn.Module):
    """Projections, query and key norms, rotary positions, core and output projection.

    Args:
        width: D, divided by `num_heads`; raises ValueError where that leaves a remainder.
        num_heads: H.
        qk_norm: LayerNorm on the queries and keys of each head.
        zero_output: start the output projection at zero.

    Example:
        >>> attention = Attention(width=32, num_heads=2)
        >>> x, context = torch.randn(1, 50, 32), torch.randn(1, 7, 32)
        >>> attention(x).shape, attention.attend(x, attention.keys_values(context)).shape
        (torch.Size([1, 50, 32]), torch.Size([1, 50, 32]))
    """

    core: AttentionCore

    def __init__(self, width: int, num_heads: int, qk_norm: bool = True, zero_output: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} does not divide into {num_heads} heads; change width or num_heads")
        self.num_heads = num_heads
        head_dim = width // num_heads
        self.to_q = xavier_linear(width, width, bias=False)
        self.to_k = xavier_linear(width, width, bias=False)
        self.to_v = xavier_linear(width, width, bias=False)
        # Of each head: [B, N, H, head_dim], over the last axis.
        self.norm_q = LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_k = LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.output = (zero_linear if zero_output else xavier_linear)(width, width)
        self.core = dense_core

    def keys_values(self, source: Tensor, rotary: RotaryTable | None = None) -> KeysValues:
        """Keys and values of `[B, N, D]`; for a context they do not change between steps."""
        # Norm, then rotation: a rotation keeps lengths, so rotated queries and keys stay normed (QK-norm).
        key = self.norm_k(self._split_heads(self.to_k(source)))
        if rotary is not None:
            key = apply_rotary(key, rotary)
        value = self._split_heads(self.to_v(source))  # [B, N, H, head_dim]
        return key.transpose(1, 2), value.transpose(1, 2)  # [B, H, N, head_dim]

    def attend(
        self,
        x: Tensor,
        keys_values: KeysValues,
        mask: Tensor | None = None,
        rotary: RotaryTable | None = None,
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`: queries from `x`, over given keys and values."""
        query = self.norm_q(self._split_heads(self.to_q(x)))  # [B, N, H, head_dim]
        if rotary is not None:
            query = apply_rotary(query, rotary)
        attended = self.core(query.transpose(1, 2), *keys_values, mask)  # [B, H, N, head_dim]
        return self.output(attended.transpose(1, 2).flatten(-2))  # heads side by side again, [B, N, D]

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: RotaryTable | None = None) -> Tensor:
        """Self-attention, `[B, N, D]` to `[B, N, D]`."""
        return self.attend(x, self.keys_values(x, rotary), mask, rotary)

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, H, head_dim]`."""
        return x.unflatten(-1, (self.num_heads, -1))
