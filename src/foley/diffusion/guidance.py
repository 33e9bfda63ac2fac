"""Classifier-free guidance: the one rule, and the joint batch that evaluates both of its branches at once.

EzAudio (Hai et al. 2024, section II-D) with scale w, rescale phi and the predictions v of a positive and a negative
prompt, the latter empty unless it is given:

    v_cfg  = v_neg + w (v_pos - v_neg)                (1)
    v_re   = v_cfg * std(v_pos) / std(v_cfg)          (2)
    v'_cfg = phi * v_re + (1 - phi) * v_cfg           (3)

(2) and (3) are Lin et al. 2024, section 3.4. All are linear in v up to the standard deviations, so that they hold for
every prediction type of a `DiffusionProcess`.

A run binds to the denoiser, once, all that stays the same throughout it: `guidance.wrap(denoiser, ...)` is what a
sampler gets, a callable of noisy latent and timestep.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from foley.core.numbers import NOT_NEGATIVE, SHARE
from foley.diffusion.windows import Windows

Denoise = Callable[[Tensor, Tensor], Tensor]
"""`(noisy [B, C, L], timestep [B]) -> prediction [B, C, L]`: all that a sampler knows of a model."""
Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `Denoise`, with the predictions of the positive and of the negative branch."""


@dataclass(frozen=True)
class Conditioning:
    """Text features `context [B, S, Dc]` with `mask [B, S]`, true where a token is valid."""

    context: Tensor
    mask: Tensor

    def expand(self, batch_size: int) -> "Conditioning":
        """One item's conditioning repeated (without a copy) over a batch."""
        return Conditioning(self.context.expand(batch_size, -1, -1), self.mask.expand(batch_size, -1))

    def cat(self, other: "Conditioning") -> "Conditioning":
        """Both along the batch axis; the shorter is padded with masked tokens."""
        tokens = max(self.mask.shape[1], other.mask.shape[1])  # S
        parts = [
            (
                pad(part.context, (0, 0, 0, tokens - part.mask.shape[1])),  # zeros, beyond the last token
                pad(part.mask, (0, tokens - part.mask.shape[1])),  # false there
            )
            for part in (self, other)
        ]
        return Conditioning(torch.cat([context for context, _ in parts]), torch.cat([mask for _, mask in parts]))


@dataclass(frozen=True)
class KnownLatent:
    """Frames that are given: a latent `visible` `[B, C, L]`, and `hidden_mask` `[B, L]`, true where it is generated."""

    visible: Tensor
    hidden_mask: Tensor

    def repeat(self, batch_size: int) -> "KnownLatent":
        """All rows, in order, again and again until they fill a batch; one row serves every item."""
        times = batch_size // len(self.visible)  # two branches, or n windows, hold the rows again and again
        return KnownLatent(self.visible.repeat(times, 1, 1), self.hidden_mask.repeat(times, 1))

    def fill(self, generated: Tensor, visible: Tensor) -> Tensor:
        """`generated` where hidden and `visible` elsewhere, each `[B, C, L]` or one row."""
        return torch.where(self.hidden_mask[:, None], generated, visible)  # [B, 1, L] over [B, C, L]


@dataclass(frozen=True)
class EvaluationGrid:
    """Where a run evaluates the denoiser: at `timesteps [E]`, on latents of `num_frames` L, or on windows of them."""

    timesteps: Tensor
    num_frames: int
    windows: Windows | None = None


def extrapolate(positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """The guided prediction `[B, C, L]`, equation (1); `scale` w is a number, or `[B, 1, 1]` for one each.

    >>> extrapolate(torch.tensor(3.0), torch.tensor(1.0), scale=5.0)
    tensor(11.)
    """
    return negative + scale * (positive - negative)  # (1)


class ClassifierFreeGuidance:
    """Equations (1)-(3) of this module.

    Args:
        scale: w in `v_neg + w (v_pos - v_neg)`; 1 is exactly the conditional model and skips the other branch.
        rescale: phi in [0, 1]: how far the guided prediction is brought back to the conditional one's spread.

    Raises ValueError for a scale that is negative or not finite, and for a rescale outside [0, 1].

    Example:
        >>> positive, negative = torch.randn(2, 8, 50), torch.randn(2, 8, 50)
        >>> guided = ClassifierFreeGuidance(scale=5.0, rescale=1.0).combine(positive, negative)
        >>> torch.allclose(guided.std(dim=(1, 2)), positive.std(dim=(1, 2)))  # each item keeps its spread
        True
        >>> ClassifierFreeGuidance(scale=1.0).combine(positive, negative) is positive
        True
    """

    def __init__(self, scale: float = 3.0, rescale: float = 0.0) -> None:
        if scale not in NOT_NEGATIVE:
            raise ValueError(f"guidance scale must be a finite number >= 0 (1 turns guidance off), got {scale}")
        if rescale not in SHARE:
            raise ValueError(f"guidance rescale must lie in [0, 1], got {rescale}")
        self.scale = scale
        self.rescale = rescale

    def __eq__(self, other: object) -> bool:
        """A rule is its numbers: requests that guide alike may be one batch."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))

    def at(self, scale: float | None = None, rescale: float | None = None) -> Self:
        """The same rule by other numbers, where they are given; raises as the class does.

        >>> ClassifierFreeGuidance(3.0, 0.5).at(scale=5.0) == ClassifierFreeGuidance(5.0, 0.5)
        True
        """
        changed = copy(self)
        numbers = self.scale if scale is None else scale, self.rescale if rescale is None else rescale
        ClassifierFreeGuidance.__init__(changed, *numbers)
        return changed

    @property
    def needs_negative(self) -> bool:
        """Whether the negative branch has any influence."""
        return self.scale != 1

    @property
    def is_constant(self) -> bool:
        """Whether every evaluation is guided alike, and so may be one compiled graph."""
        return True

    def combine(self, positive: Tensor, negative: Tensor, hidden_mask: Tensor | None = None) -> Tensor:
        """The guided prediction `[B, C, L]`; each item is rescaled by its own spread.

        Only the frames of `hidden_mask` count for that, `[B, L]` or one row: the others' predictions are discarded, and
        no training has made anything of them.
        """
        if not self.needs_negative:  # w = 1: exactly the conditional prediction, without a rounding
            return positive
        return self.rescaled(extrapolate(positive, negative, self.scale), positive, hidden_mask)  # (1)

    def rescaled(self, guided: Tensor, positive: Tensor, hidden_mask: Tensor | None = None) -> Tensor:
        """Equations (2) and (3), on a prediction `[B, C, L]` that is guided already."""
        if not self.rescale:
            return guided
        ratio = _spread(positive, hidden_mask) / _spread(guided, hidden_mask)  # [B, 1, 1]
        return self.rescale * (guided * ratio) + (1 - self.rescale) * guided  # (2) in brackets, then (3)

    def wrap(
        self,
        denoiser: Callable[..., Tensor],
        positive: Conditioning,
        negative: Conditioning | None = None,
        known: KnownLatent | None = None,
        grid: EvaluationGrid | None = None,
        more: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Denoise:
        """A guided callable over `denoiser(noisy, timestep, context=..., context_mask=...)`.

        `positive` has one row per item. `negative` has one row per item or one in all; it may be None only when
        the scale is 1. The two branches run as one joint batch, positive rows first. `known`, with one row per item
        or one in all, reaches both branches, as `visible` and `hidden_mask`; without it neither is passed.
        With a `grid`, a denoiser that has `prepare` does there, once, all that every evaluation of the run repeats.
        `more` inputs of the denoiser have one row per item, and reach both branches.
        """
        alone = partial(bind, denoiser, positive, known, grid, more)
        if not self.needs_negative:  # half the work
            return alone()
        if negative is None:
            raise ValueError(f"guidance scale {self.scale} needs the conditioning of the negative (empty) prompt")
        predict = branches(denoiser, positive, negative, known, grid, more)
        return self.follow(predict, alone, None if known is None else known.hidden_mask)

    def follow(self, both: Branches, alone: Callable[[], Denoise], hidden_mask: Tensor | None) -> Denoise:
        """The guided callable of a run; `alone` makes one of the positive branch, for rules that want it."""
        return lambda noisy, timestep: self.combine(*both(noisy, timestep), hidden_mask)

    def branches(self, num_evaluations: int) -> tuple[int, ...] | None:
        """How many branches each evaluation has, where not all have as many; None: they do."""
        return None

    def constant(self) -> "ClassifierFreeGuidance":
        """The rule of the same scale that is the same at all evaluations: with it calibrations are made."""
        return self

    def describe(self) -> dict[str, Any]:
        """What the JSON of each clip says of it."""
        return {"guidance_scale": self.scale, "guidance_rescale": self.rescale}


class EmbeddedGuidance(ClassifierFreeGuidance):
    """Guidance that a distilled student computes itself: it is given the scale w, and evaluated once.

    Args:
        scale: w, in the convention of `ClassifierFreeGuidance`.
        embedded: what the denoiser is told of it, see `Consistency.embedded`; None is w itself.
    """

    def __init__(self, scale: float, embedded: float | None = None) -> None:
        super().__init__(scale)
        self.embedded = scale if embedded is None else embedded

    @property
    def needs_negative(self) -> bool:
        """Never: the negative branch is in the student's weights."""
        return False

    def wrap(
        self,
        denoiser: Callable[..., Tensor],
        positive: Conditioning,
        negative: Conditioning | None = None,
        known: KnownLatent | None = None,
        grid: EvaluationGrid | None = None,
        more: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Denoise:
        """As for `ClassifierFreeGuidance`; the denoiser takes `guidance_scale [1]` too. `negative` is not used."""
        scale = torch.full((1,), float(self.embedded), device=positive.context.device)  # for all items and evaluations
        return bind(denoiser, positive, known, grid, {**more, "guidance_scale": scale})


def _spread(prediction: Tensor, hidden_mask: Tensor | None) -> Tensor:
    """The standard deviation `[B, 1, 1]` of each item's values, of its hidden frames alone where there is a mask."""
    if hidden_mask is None:
        return prediction.std(dim=(1, 2), keepdim=True)
    weight = hidden_mask[:, None].to(prediction.dtype).expand_as(prediction)  # [B, C, L]
    count = weight.sum(dim=(1, 2), keepdim=True)  # C times the hidden frames, [B, 1, 1]
    mean = (weight * prediction).sum(dim=(1, 2), keepdim=True) / count
    squares = (weight * (prediction - mean).square()).sum(dim=(1, 2), keepdim=True)
    return (squares / (count - 1)).sqrt()  # unbiased, as torch.std is


def branches(
    denoiser: Callable[..., Tensor],
    positive: Conditioning,
    negative: Conditioning,
    known: KnownLatent | None = None,
    grid: EvaluationGrid | None = None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> Branches:
    """The predictions of the positive and of the negative branch, in one joint batch; as `wrap` describes.

    `more` inputs have one row per item, and reach both branches.
    """
    twice = {name: torch.cat([rows, rows]) for name, rows in more.items()}  # [2 B, ...]
    # One evaluation of 2 B rows costs less than two of B, and accelerators then take one decision for both branches.
    predict = bind(denoiser, positive.cat(negative.expand(len(positive.mask))), known, grid, twice)

    def both(noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        first, second = predict(noisy.repeat(2, 1, 1), timestep.repeat(2)).chunk(2)  # [2 B, C, L] to twice [B, C, L]
        return first, second

    return both


def bind(
    denoiser: Callable[..., Tensor],
    text: Conditioning,
    known: KnownLatent | None = None,
    grid: EvaluationGrid | None = None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> Denoise:
    """The denoiser with everything bound to it that stays the same throughout a run, `more` inputs included.

    With windows, `more` must hold for all items.
    """
    if grid is not None and grid.windows is not None:
        return _bind_windows(denoiser, text, known, grid, grid.windows, more)
    inputs: dict[str, Any] = {"context": text.context, "context_mask": text.mask, **more}
    if known is not None:
        rows = known.repeat(len(text.mask))  # both branches see the same frames
        inputs |= {"visible": rows.visible, "hidden_mask": rows.hidden_mask}
    # Projections of the text, embeddings of the times and rotary angles are the same at every evaluation of a run.
    prepare = getattr(denoiser, "prepare", None)
    if grid is None or prepare is None:
        return partial(denoiser, **inputs)
    return partial(denoiser, run=prepare(grid.timesteps, grid.num_frames, **inputs))


def _bind_windows(
    denoiser: Callable[..., Tensor],
    text: Conditioning,
    known: KnownLatent | None,
    grid: EvaluationGrid,
    windows: Windows,
    more: Mapping[str, Tensor],
) -> Denoise:
    """As `bind`, on all windows of the latent in one batch."""
    text = Conditioning(windows.repeat(text.context), windows.repeat(text.mask))  # [n B, ...]
    if known is not None:
        rows = known.repeat(len(text.mask) // windows.count)
        known = KnownLatent(windows.split(rows.visible), windows.split(rows.hidden_mask))  # [n B, C, W], [n B, W]
    predict = bind(denoiser, text, known, EvaluationGrid(grid.timesteps, windows.window_frames), more)
    return lambda noisy, timestep: windows.merge(predict(windows.split(noisy), windows.repeat(timestep)))
