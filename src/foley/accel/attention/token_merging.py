"""Token Merging for Stable Diffusion (Bolya and Hoffman 2023): LiteFocus's baseline, on the same U-Net."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foley.accel.attention.seeded import SeededAccelerator
from foley.accel.diffusers.audioldm2 import (
    Attend,
    FeatureMapSizes,
    UNetSelfAttention,
    find_self_attention,
    first_input,
    replaced_attention,
    watched_feature_maps,
)
from foley.core.numbers import COUNT, NumberRange

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

Matchings = dict[nn.Module, "TokenMatching"]  # of each transformer block, at the present evaluation


@dataclass(frozen=True)
class TokenMatching:
    """Which tokens become one: token n of item b goes to row `rows[b, n]` of `num_rows`; `rows` is `[B, N]`."""

    rows: Tensor
    num_rows: int

    def merge(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, num_rows, D]`: each row is the mean of its tokens."""
        merged = x.new_zeros(len(x), self.num_rows, x.shape[-1])
        # `include_self=False`: the zeros are no part of the mean.
        return merged.scatter_reduce(1, self._index(x), x, "mean", include_self=False)

    def unmerge(self, x: Tensor) -> Tensor:
        """`[B, num_rows, D]` to `[B, N, D]`: each token takes a copy of its row."""
        return x.gather(1, self._index(x))

    def _index(self, x: Tensor) -> Tensor:
        return self.rows.unsqueeze(-1).expand(-1, -1, x.shape[-1])  # [B, N, D]


def draw_destinations(frames: int, frequencies: int, stride: tuple[int, int], generator: torch.Generator) -> Tensor:
    """One token index `t * frequencies + f` at random in each cell of `stride` frames and frequencies, `[M]`.

    What is left at the ends, where the strides do not divide the sizes, holds no destination.
    """
    cells = frames // stride[0], frequencies // stride[1]  # whole ones, in time and in frequency
    # A place in each cell, counted row by row.
    offset = torch.randint(stride[0] * stride[1], cells, generator=generator)
    frame = torch.arange(cells[0]).unsqueeze(1) * stride[0] + offset // stride[1]  # [cells in time, cells in frequency]
    frequency = torch.arange(cells[1]) * stride[1] + offset % stride[1]
    return (frame * frequencies + frequency).flatten()


def match_tokens(features: Tensor, destinations: Tensor, num_merged: int) -> TokenMatching:
    """Bipartite soft matching: the `num_merged` sources most alike to a destination merge into the likest one.

    Args:
        features: `[B, N, D]`, compared by their cosine.
        destinations: `[M]`; all other tokens are sources.
        num_merged: at most N - M.

    Example:
        The third of four tokens is like the first, which is the only destination: they become one row of three.

        >>> features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, -1.0]]])
        >>> matching = match_tokens(features, destinations=torch.tensor([0]), num_merged=1)
        >>> matching.rows
        tensor([[2, 0, 2, 1]])
        >>> matching.merge(features).shape
        torch.Size([1, 3, 2])
    """
    destinations = destinations.to(features.device)
    is_destination = torch.zeros(features.shape[1], device=features.device).index_fill(0, destinations, 1.0)
    # Of [N]. Sorted, sources come first and in order; to look for them by `nonzero` would wait for the device.
    sources = is_destination.argsort(stable=True)[: features.shape[1] - len(destinations)]
    directions = F.normalize(features, dim=-1)  # of length 1, so that products are cosines
    # Of each source: its likest destination, and how alike they are, [B, N - M].
    similarity, target = (directions[:, sources] @ directions[:, destinations].mT).max(dim=-1)
    # 0 is the source most alike to a destination; those of the first ranks merge.
    rank = similarity.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    # Rows: first the sources that are kept, then the destinations.
    num_kept = len(sources) - num_merged  # the sources that stay by themselves
    rows = torch.empty(features.shape[:2], dtype=torch.long, device=features.device)
    # A merged source goes to the row of its destination, a kept one to that of its rank among the kept.
    rows[:, sources] = torch.where(rank < num_merged, num_kept + target, rank - num_merged)
    rows[:, destinations] = num_kept + torch.arange(len(destinations), device=features.device)
    return TokenMatching(rows, num_kept + len(destinations))


class TokenMerging(SeededAccelerator):
    """Token Merging on AudioLDM2's U-Net: alike tokens are one token during self-attention, and apart after it.

    Args:
        ratio: the share of the tokens that is merged away; 0 leaves the U-Net as it is.
        blocks: of the U-Net; LiteFocus compares on its own.
        attentions: "attn1", and "attn2" for the second self-attention of transformers without text, which the
            published default leaves alone.
        stride: frames and frequencies of the cells that hold one destination each.
        seed: of the destinations, which are drawn anew for each transformer block and evaluation.

    Raises:
        ValueError: the ratio is negative, or more than the tokens that are not destinations; or another layer is named.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        blocks: Sequence[str] = ("down_blocks.1", "up_blocks.2"),
        attentions: Sequence[str] = ("attn1",),
        stride: tuple[int, int] = (2, 2),
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for size in stride:
            COUNT.check("stride", size)
        largest = 1 - 1 / math.prod(stride)  # each cell keeps one token, its destination
        if ratio not in NumberRange(least=0, most=largest):
            raise ValueError(f"ratio must be between 0 and {largest:g} for stride {tuple(stride)}, got {ratio}")
        unknown = set(attentions) - {"attn1", "attn2"}
        if unknown or not attentions:
            raise ValueError(f"attentions must name attn1, attn2 or both, got {list(attentions)}")
        self._ratio = ratio
        self._blocks = blocks
        self._attentions = attentions
        self._stride = stride

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Merge and unmerge around the attention processors inside the context, and restore them on any exit.

        Raises as `LiteFocus.attach` does.
        """
        layers = find_self_attention(denoiser, self._blocks)
        layers = [layer for layer in layers if layer.name.rpartition(".")[2] in self._attentions]
        matchings: Matchings = {}
        with ExitStack() as stack:
            sizes = stack.enter_context(watched_feature_maps(layers))
            stack.enter_context(replaced_attention(layers, partial(self._merged, matchings)))
            # Once a block, whose layers share the matching: on its input, before its norms, as published.
            for layer in {layer.block: layer for layer in layers}.values():
                match = partial(self._match, matchings, sizes, layer)
                stack.callback(layer.block.register_forward_pre_hook(match, with_kwargs=True).remove)
            yield

    def _match(
        self,
        matchings: Matchings,
        sizes: FeatureMapSizes,
        layer: UNetSelfAttention,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        tokens = first_input(args, kwargs)
        num_merged = math.floor(self._ratio * tokens.shape[1])
        name, size = layer.name.rpartition(".")[0], sizes[layer.transformer]  # frames and frequencies
        destinations = self.drawn(name, draw_destinations, *size, self._stride, device=tokens.device)
        matchings[block] = match_tokens(tokens, destinations, num_merged)

    def _merged(self, matchings: Matchings, layer: UNetSelfAttention) -> Attend:
        original = layer.attention.processor

        def attend(attention: "Attention", tokens: Tensor) -> Tensor:
            matching = matchings[layer.block]
            if matching.num_rows == tokens.shape[1]:
                return original(attention, tokens)  # nothing merges: the layer as it is, to the last bit
            # [B, N, D] to [B, num_rows, D] and back.
            return matching.unmerge(original(attention, matching.merge(tokens)))

        return attend
