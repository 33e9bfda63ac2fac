"""Masked modelling of latents (EzAudio, Section II-C): which frames are hidden, and how a visible latent enters.

The model learns sound without text by completing hidden frames from the visible ones; all hidden is the ordinary
unconditional model. Editing later uses the same inputs.
"""

import torch
from torch import Tensor, nn

from foley.core.devices import to_device


class SpanMask:
    """Draws the frames to hide, as spans on a grid with a random phase (EzAudio, Section II-C).

    A clip shorter than a span is hidden in full.

    Args:
        span_frames: frames per span.
        ratio: bounds of the uniformly drawn share of spans to hide.
        partial_probability: share of items that are masked in part; the others are hidden in full.

    Raises:
        ValueError: where a span has no frame, or the bounds are not 0 < low <= high <= 1.

    Example:
        >>> mask = SpanMask(span_frames=10, ratio=(0.25, 1.0))  # 0.2 s at 50 frames a second, as published
        >>> hidden = mask(2, 500, torch.Generator().manual_seed(0))
        >>> hidden.shape, hidden.dtype
        (torch.Size([2, 500]), torch.bool)
    """

    def __init__(
        self, span_frames: int = 10, ratio: tuple[float, float] = (0.25, 1.0), partial_probability: float = 1.0
    ) -> None:
        low, high = ratio
        if span_frames < 1 or not 0 < low <= high <= 1:
            raise ValueError(f"need span_frames >= 1 and 0 < low <= high <= 1, got {span_frames} and ratio {ratio}")
        self.span_frames = span_frames
        self.low, self.high = low, high
        self.partial_probability = partial_probability

    def __call__(
        self, batch_size: int, num_frames: int, generator: torch.Generator, valid: Tensor | None = None
    ) -> Tensor:
        """`hidden_mask [B, L]`, true = hidden; every item hides one frame or more.

        No run of hidden frames, or of visible ones, is shorter than a span, at the ends of a clip either.

        Args:
            generator: on the CPU.
            valid: `[B, L]`, false on padding; the mask is on its device, or on the CPU without it.
        """
        spans = max(1, num_frames // self.span_frames)
        # Drawn whatever the probability, so that it changes nothing of the other draws.
        draws = (torch.rand(batch_size, width, generator=generator) for width in (1, 1, 1, 1, spans))
        lengths = torch.full((batch_size, 1), num_frames) if valid is None else valid.sum(dim=1, keepdim=True)
        share, rounding, start, partial, order = (to_device(draw, lengths.device) for draw in draws)
        # The grid begins somewhere within a span, so that no frame is always the first of one. What is left at either
        # end belongs to the first span and to the last.
        phase = (start * self.span_frames).long()  # [B, 1]
        num_spans = ((lengths - phase) // self.span_frames).clamp(min=1)  # [B, 1]
        frame = torch.arange(num_frames, device=lengths.device)
        frame_span = ((frame - phase) // self.span_frames).clamp(min=0).minimum(num_spans - 1)  # [B, L]
        # A share uniform in [low, high] of the spans, rounded up as often as it is nearer: the first of a random order.
        ratio = self.low + (self.high - self.low) * share
        num_hidden = (ratio * num_spans + rounding).floor().clamp(min=1)  # [B, 1]
        absent = torch.arange(spans, device=lengths.device) >= num_spans  # [B, spans]
        rank = order.masked_fill(absent, 2).argsort(dim=1).argsort(dim=1)  # a span's place in that order
        return (rank < num_hidden).gather(1, frame_span) | (partial >= self.partial_probability)


class SlicedLinear(nn.Linear):
    """A linear layer whose weight is sliced, and which is never called as a whole.

    What swaps layers by their type, as `torch.ao.quantization.quantize_dynamic` does, leaves it alone.
    """


class MaskedInput(nn.Module):
    """Builds the input channels that do not change during a generation: `[visible C, mask 1]`.

    Args:
        latent_channels: C.
    """

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.mask_embedding = nn.Parameter(torch.empty(latent_channels))
        nn.init.normal_(self.mask_embedding, std=0.02)

    def forward(self, visible: Tensor | None, hidden_mask: Tensor | None) -> Tensor:
        """A visible latent `[B, C, L]` and `hidden_mask [B, L]` to tokens `[B, L, C + 1]`; `[1, 1, C + 1]` without one.

        Hidden frames of the visible latent hold the learned vector; no visible latent means that all are hidden.
        Raises ValueError where a visible latent comes without its mask.
        """
        if visible is None:
            return torch.cat([self.mask_embedding, self.mask_embedding.new_ones(1)])[None, None]
        if hidden_mask is None:
            raise ValueError("a visible latent needs `hidden_mask [B, L]`, true where frames are to be generated")
        hidden = hidden_mask.unsqueeze(-1)  # [B, L, 1]
        filled = torch.where(hidden, self.mask_embedding, visible.transpose(1, 2).to(self.mask_embedding.dtype))
        return torch.cat([filled, hidden.to(filled.dtype)], dim=-1)  # [B, L, C + 1]
