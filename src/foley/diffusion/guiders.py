"""Guidance that is not the same at all evaluations, by the guiders of `diffusers`.

`IntervalGuidance` (Kynkäänniemi et al. 2024) guides in the middle of a run alone: at the noisiest levels guidance costs
variety, at the cleanest it does nothing, and where it is left out the positive branch runs alone, at half the work.

`ProjectedGuidance` (Sadat et al. 2024, adaptive projected guidance, algorithm 1) takes of each update of the clean
estimate D = D_pos + (w - 1) d, with d = D_pos - D_neg, what saturates:

    d <- d + beta d_before                            a momentum beta, usually negative
    d <- d min(1, r / |d|)                            a longest update r
    d <- d_orthogonal + eta d_parallel                to D_pos: the parallel part is gain, which large w overdo

A guider decides by the number of the evaluation, which the sampler tells it: a guided run is a callback, too.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foley.core.numbers import NOT_NEGATIVE, SHARE, NumberRange
from foley.diffusion.context import RunContext, StepContext
from foley.diffusion.guidance import Branches, ClassifierFreeGuidance, Denoise

_MOMENTUM = NumberRange(above=-1, most=1)


class IntervalGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance at the evaluations from a share `start` of the run up to a share `stop`, there alone.

    Shares are of the evaluations, as `diffusers` counts them, so that the interval is one of noise levels that the
    number of steps does not move; a run that begins in the middle keeps them.

    Args:
        scale, rescale: as for `ClassifierFreeGuidance`.
        start, stop: 0 and 1 guide throughout.

    Raises ValueError as `ClassifierFreeGuidance` does, and for an interval that is none.

    >>> IntervalGuidance(3.0, start=0.25, stop=0.75).branches(8)
    (1, 1, 2, 2, 2, 2, 1, 1)
    """

    rule = "interval"

    def __init__(self, scale: float = 3.0, rescale: float = 0.0, start: float = 0.0, stop: float = 1.0) -> None:
        super().__init__(scale, rescale)
        SHARE.check("guidance.start", start)
        SHARE.check("guidance.stop", stop)
        if start >= stop:
            raise ValueError(f"guidance.start={start} must be below guidance.stop={stop}")
        self.start, self.stop = start, stop

    @property
    def is_constant(self) -> bool:
        """Never: a guider decides anew at each evaluation."""
        return False

    def constant(self) -> ClassifierFreeGuidance:
        """Classifier-free guidance throughout."""
        return ClassifierFreeGuidance(self.scale, self.rescale)

    def branches(self, num_evaluations: int) -> tuple[int, ...] | None:
        """2 inside of the interval and 1 outside; None where that makes no difference."""
        counts = self.counts(num_evaluations) if self.needs_negative else ()  # at w = 1 nothing is guided
        return counts if len(set(counts)) > 1 else None

    def counts(self, num_evaluations: int) -> tuple[int, ...]:
        """Of branches, at each evaluation."""
        guider, counts = self.guider(), []
        for evaluation in range(num_evaluations):
            guider.set_state(evaluation, num_evaluations, None)
            counts.append(int(guider.num_conditions))  # outside of the interval it asks for one
        return tuple(counts)

    def describe(self) -> dict[str, Any]:
        interval = {"guidance_start": self.start, "guidance_stop": self.stop}
        return {**super().describe(), "guidance": self.rule, **interval}

    def follow(self, both: Branches, alone: Callable[[], Denoise], hidden_mask: Tensor | None) -> Denoise:
        return GuidedRun(self, both, alone, hidden_mask)

    def guider(self) -> Any:
        """One of `diffusers`, for one run."""
        guiders = _guiders()
        return guiders.ClassifierFreeGuidance(guidance_scale=self.scale, start=self.start, stop=self.stop)

    def guide(
        self, guider: Any, positive: Tensor, negative: Tensor, of_prediction: Tensor, clean: Tensor, hidden: Tensor
    ) -> Tensor:
        """The guided prediction `[B, C, L]`, before any rescale.

        Args:
            of_prediction: by which a prediction is multiplied in the clean estimate, `[]`.
            clean: the clean estimate `[B, C, L]` of the positive branch.
            hidden: the frames that count, `[B, 1, L]` or one row.
        """
        guided: Tensor = guider.forward(positive, negative).pred  # (1), linear: any quantity will do
        return guided


class ProjectedGuidance(IntervalGuidance):
    """Adaptive projected guidance; without momentum and longest update, and with `eta` 1, classifier-free guidance.

    Norms and projections are of the clean estimate, each item's own, over the frames that are generated.

    Args:
        scale, rescale, start, stop: as for `IntervalGuidance`.
        eta: how much of the part that is parallel to the positive estimate is kept.
        momentum: beta; None is 0.
        largest_update: r, in root mean square over the values of a latent, which has a variance of about 1, so that a
            clip of any length is guided alike (the paper's norms are of images of one size); None does not bound it.

    Raises ValueError as `IntervalGuidance` does, and for numbers that are impossible.
    """

    rule = "apg"

    def __init__(
        self,
        scale: float = 3.0,
        rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        eta: float = 0.0,
        momentum: float | None = -0.5,
        largest_update: float | None = None,
    ) -> None:
        super().__init__(scale, rescale, start, stop)
        NOT_NEGATIVE.check("guidance.eta", eta)
        if momentum is not None:
            _MOMENTUM.check("guidance.momentum", momentum)
        if largest_update is not None:
            NumberRange(above=0).check("guidance.largest_update", largest_update)
        self.eta, self.momentum, self.largest_update = eta, momentum, largest_update

    def describe(self) -> dict[str, Any]:
        options = {"eta": self.eta, "momentum": self.momentum, "largest_update": self.largest_update}
        return {**super().describe(), **{f"guidance_{name}": value for name, value in options.items()}}

    def guider(self) -> Any:
        guider = _guiders().AdaptiveProjectedGuidance(
            guidance_scale=self.scale - 1,  # of D_pos + (w - 1) d
            use_original_formulation=True,
            adaptive_projected_guidance_rescale=self.largest_update or 0.0,
            eta=self.eta,
            start=self.start,
            stop=self.stop,
        )
        # Its own buffer makes a new tensor at each evaluation, which no recorded graph would find.
        guider.momentum_buffer = None if self.momentum is None else _Momentum(self.momentum)
        return guider

    def guide(
        self, guider: Any, positive: Tensor, negative: Tensor, of_prediction: Tensor, clean: Tensor, hidden: Tensor
    ) -> Tensor:
        # What is known of a recording has no part in norms: zero in both estimates, it adds nothing to them.
        count = hidden.sum(dim=(1, 2), keepdim=True) * positive.shape[1]  # values that count, [B, 1, 1]
        unit = count.to(clean).sqrt()  # in this unit a norm is a root mean square
        towards = (clean * hidden) / unit  # D_pos
        away = towards - of_prediction * (positive - negative).to(clean) * hidden / unit  # D_neg
        update = guider.forward(towards, away).pred - towards  # (w - 1) d
        # The update alone: a clean estimate, brought back to a prediction, loses digits where there is little noise.
        return positive + (unit * update / of_prediction).to(positive)


class GuidedRun:
    """A `Denoise` whose rule changes on the way, and the callback by which it knows where the run is.

    Args:
        both, alone: the predictions of both branches, and what makes those of the positive one.
        hidden_mask: frames that are generated, `[B, L]` or one row; None for all.
    """

    def __init__(
        self,
        guidance: IntervalGuidance,
        both: Branches,
        alone: Callable[[], Denoise],
        hidden_mask: Tensor | None,
    ) -> None:
        self._guidance, self._both, self._make_alone = guidance, both, alone
        self._hidden_mask = hidden_mask
        self._guider: Any = None
        self._alone: Denoise | None = None
        self._branch = "joint"
        # Weights of noisy latent and prediction in the clean estimate: of all evaluations, and of this one, which
        # stay where a recorded evaluation looks for them.
        self._table, self._weights = torch.ones(0, 2), torch.ones(2)

    def on_run_start(self, run: RunContext) -> None:
        """Raises ValueError where noise levels are not known, and so no clean estimate."""
        if run.clean_weights is None:
            raise ValueError(f"{type(self._guidance).__name__}: this loop does not say what its noise levels are")
        self._guider, self._table = self._guidance.guider(), run.clean_weights.float()
        if 1 in self._guidance.counts(run.num_evaluations):  # now: what it prepares is no part of an evaluation
            self._alone = self._make_alone()

    def on_evaluation_start(self, context: StepContext) -> None:
        self._guider.set_state(context.evaluation, context.run.num_evaluations, context.timestep)
        self._branch = context.branch
        self._weights.copy_(self._table[context.evaluation])
        if isinstance(momentum := getattr(self._guider, "momentum_buffer", None), _Momentum):
            momentum.begin()

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        pass

    def on_run_end(self) -> None:
        pass

    def graph_pattern(self) -> str:
        """Evaluations differ in their branches alone; all other state lies in tensors that stay in their place."""
        return self._branch

    def __call__(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction `[B, C, L]`, outside of the interval that of the positive branch alone."""
        if self._guider is None:
            raise RuntimeError(f"{type(self._guidance).__name__} changes on the way: the sampler must tell it the step")
        if self._weights.device != noisy.device:  # at the first evaluation, which is never recorded
            self._table, self._weights = self._table.to(noisy.device), self._weights.to(noisy.device)
        if self._guider.num_conditions == 1:
            assert self._alone is not None
            return self._alone(noisy, timestep)
        positive, negative = self._both(noisy, timestep)
        of_noisy, of_prediction = self._weights
        clean = of_noisy * noisy.float() + of_prediction * positive.float()  # D_pos
        hidden = torch.ones_like(clean[:, :1]) if self._hidden_mask is None else self._hidden_mask[:, None].to(clean)
        guided = self._guidance.guide(self._guider, positive, negative, of_prediction, clean, hidden)
        return self._guidance.rescaled(guided, positive, self._hidden_mask)


class _Momentum:
    """`d + beta d_before` as the guiders call it, in memory that stays in its place.

    What was before an evaluation is kept apart, so that one that is replayed, or computed twice, comes out the same.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._before: Tensor | None = None
        self.running_average: Tensor | None = None

    def begin(self) -> None:
        """An evaluation begins."""
        if self._before is not None and self.running_average is not None:
            self._before.copy_(self.running_average)

    def update(self, update: Tensor) -> None:
        if self.running_average is None or self._before is None:
            self.running_average, self._before = update.clone(), torch.zeros_like(update)
        else:
            torch.add(update, self._before, alpha=self._momentum, out=self.running_average)


def _guiders() -> Any:
    from diffusers import guiders  # seconds, which other rules need not wait for

    # Each that is made warns that its interface may change: ours is pinned, and tested.
    logging.getLogger("diffusers.guiders.guider_utils").setLevel(logging.ERROR)
    return guiders
