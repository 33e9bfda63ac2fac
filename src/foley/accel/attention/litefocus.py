"""LiteFocus (Tan et al. 2024): each query attends to its own frequency and to a random sample of all tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foley.accel.attention.seeded import SeededAccelerator
from foley.accel.attention.sparse import flex_union, takes_flex
from foley.accel.diffusers.audioldm2 import (
    Attend,
    FeatureMapSizes,
    UNetSelfAttention,
    find_self_attention,
    replaced_attention,
    watched_feature_maps,
)
from foley.core.numbers import SHARE

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def compensation_indices(num_tokens: int, ratio: float, generator: torch.Generator) -> Tensor:
    """`floor(ratio * num_tokens)` different token indices, drawn on the generator's device (LiteFocus, eq. 6)."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is a share of the tokens, between 0 and 1, got {ratio}")
    return torch.randperm(num_tokens, generator=generator)[: math.floor(ratio * num_tokens)]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_frequencies: int,
    compensation_indices: Tensor,
    double_count: bool = False,
    same_frequency: bool = True,
) -> Tensor:
    """Softmax attention over `{same frequency} united with C`, `[B, H, N, D]` to `[B, H, N, D]` (LiteFocus, eq. 1-5).

    Queries are grouped by frequency, so that each group shares its keys: O(N (T + r N)) scores, none of which is
    computed and thrown away but those of duplicates.

    Args:
        q, k, v: `[B, H, N, D]`; token `t * num_frequencies + f` is frame t, frequency f.
        compensation_indices: C `[M]`, all different; empty for attention to the same frequency only.
        double_count: count a key in both sets twice, as the published code does; by default once, as the paper says.
        same_frequency: false attends to C alone.

    Raises ValueError where N is no multiple of the number of frequencies, or there is nothing to attend to.
    Example (with every token in C it is dense attention, since duplicates count once):
        >>> q, k, v = torch.randn(3, 1, 2, 12, 8)  # 4 frames of 3 frequencies
        >>> sparse = sparse_attention(q, k, v, num_frequencies=3, compensation_indices=torch.arange(12))
        >>> torch.allclose(sparse, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
        True
    """
    if q.shape[2] % num_frequencies:
        raise ValueError(f"{q.shape[2]} tokens do not divide into {num_frequencies} frequencies")
    indices = compensation_indices.to(q.device)
    shared_k, shared_v = (x.index_select(2, indices) for x in (k, v))  # of C, the same for all queries: [B, H, M, D]
    if not same_frequency:
        if not len(indices):
            raise ValueError("attention without the same frequency needs compensation tokens, got none: raise `ratio`")
        return F.scaled_dot_product_attention(q, shared_k, shared_v)
    if takes_flex(q):
        return flex_attention_of(q, k, v, num_frequencies, indices, double_count)
    # Eq. 4: F_i is S_i and C. S_i is eq. 5 with `mod N_f` in the place of its `mod N_t`, since token t * N_f + f has
    # frequency f. A group is one frequency, and takes the place of a head: keys [B, F H, T + M, D].
    keys, values = (
        torch.cat([_by_frequency(x, num_frequencies), tokens.repeat(1, num_frequencies, 1, 1)], dim=2)
        for x, tokens in ((k, shared_k), (v, shared_v))
    )
    mask = None if double_count or not len(indices) else _counted_once(indices, num_frequencies, keys)
    # Eq. 1: one softmax over both sets, queries [B, F H, T, D].
    attended = F.scaled_dot_product_attention(_by_frequency(q, num_frequencies), keys, values, attn_mask=mask)
    # Groups back to tokens t * F + f: [B, F, H, T, D] to [B, H, T F, D].
    return attended.unflatten(1, (num_frequencies, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def flex_attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_frequencies: int,
    indices: Tensor,
    double_count: bool = False,
    attend: Callable[..., Any] | None = None,
) -> Tensor:
    """`sparse_attention` by FlexAttention, or by what stands in its place, `attend`: no key is copied per frequency."""
    frames = q.shape[2] // num_frequencies  # T
    # Token t * F + f to row f * T + t: [B, H, T F, D] to [B, H, F T, D].
    q, k, v = (x.unflatten(2, (-1, num_frequencies)).transpose(2, 3).flatten(2, 3) for x in (q, k, v))
    rows = indices % num_frequencies * frames + indices // num_frequencies
    places = torch.arange(q.shape[2], device=q.device) // frames  # each row's frequency
    same, reach = partial(_same_frequency, frames), (frames, 0)
    attended = flex_union(q, k, v, rows, places, same, reach, double_count=double_count, attend=attend)
    return attended.unflatten(2, (num_frequencies, -1)).transpose(2, 3).flatten(2, 3)


def _same_frequency(frames: int, query: Tensor, key: Tensor) -> Tensor:
    return query // frames == key


def _by_frequency(x: Tensor, num_frequencies: int) -> Tensor:
    """`[B, H, T F, D]` to `[B, F H, T, D]`; no copy where heads were split from the last axis."""
    # [B, H, T, F, D] to [B, F, H, T, D].
    return x.unflatten(2, (-1, num_frequencies)).permute(0, 3, 1, 2, 4).flatten(1, 2)


def _counted_once(indices: Tensor, num_frequencies: int, keys: Tensor) -> Tensor:
    """A mask `[1, F H, 1, T + M]` of `keys [B, F H, T + M, D]`, false where one of the last M is among the first T."""
    frequencies = torch.arange(num_frequencies, device=indices.device).unsqueeze(1)  # [F, 1]
    # [F, T + M]: all groups keep a token of C but the one of its frequency, which has it already.
    keep = F.pad(indices % num_frequencies != frequencies, (keys.shape[2] - len(indices), 0), value=True)
    # One row of it for each head of a group.
    return keep.repeat_interleave(keys.shape[1] // num_frequencies, dim=0)[None, :, None]


class LiteFocus(SeededAccelerator):
    """LiteFocus on AudioLDM2's U-Net: the compensation tokens are drawn anew for each layer and evaluation.

    Args:
        ratio: r, the share of all tokens that every query attends to; 0 leaves the same frequency alone.
        blocks: of the U-Net. Published: its second down block and the up block of the same resolution.
        same_frequency: false attends to the compensation tokens only.
        double_count: as in `sparse_attention`.
        seed: of the compensation tokens.
        fallback: attend densely wherever that is faster by `foley.accel.attention.sparse.pays`; the configs do.
    """

    def __init__(
        self,
        ratio: float = 0.1,
        blocks: Sequence[str] = ("down_blocks.1", "up_blocks.2"),
        same_frequency: bool = True,
        double_count: bool = False,
        seed: int = 0,
        fallback: bool = False,
    ) -> None:
        super().__init__(seed, fallback)
        SHARE.check("ratio", ratio)
        self._ratio = ratio
        self._blocks = blocks
        self._own_frequency = same_frequency
        self._core = partial(sparse_attention, double_count=double_count, same_frequency=same_frequency)

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Replace the attention processors inside the context, and restore them on any exit.

        Raises:
            ValueError: the denoiser is no AudioLDM2 U-Net, or lacks one of the blocks.
            RuntimeError: LiteFocus or Token Merging is attached to it already.
        """
        layers = find_self_attention(denoiser, self._blocks)
        with watched_feature_maps(layers) as sizes, replaced_attention(layers, partial(self._sparse, sizes)):
            yield

    def _sparse(self, sizes: FeatureMapSizes, layer: UNetSelfAttention) -> Attend:
        original = layer.attention.processor

        def attend(attention: "Attention", tokens: Tensor) -> Tensor:
            num_frames, num_frequencies = sizes[layer.transformer]
            num_tokens, device = tokens.shape[1], tokens.device
            keys = math.floor(self._ratio * num_tokens) + (num_frames if self._own_frequency else 0)
            if not self.chooses_sparse(num_tokens, keys, device):
                return original(attention, tokens)
            indices = self.drawn(layer.name, compensation_indices, num_tokens, self._ratio, device=device)
            # The layer's own weights; only the core is another.
            projections = (attention.to_q, attention.to_k, attention.to_v)
            # Each [B, H, N, head_dim].
            q, k, v = (project(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for project in projections)
            attended = self._core(q, k, v, num_frequencies, indices).transpose(1, 2).flatten(-2)  # [B, N, D]
            for module in attention.to_out:  # a linear layer, then dropout
                attended = module(attended)
            return attended

        return attend
