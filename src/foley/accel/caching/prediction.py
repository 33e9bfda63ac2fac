"""Prediction reuse: at chosen evaluations the denoiser does not run, and its output is extrapolated from earlier ones.

What a denoiser predicts along one path is a smooth function of the noise level, much smoother than a solver's few steps
would need it. So of the evaluations of a run only some are computed; in between stands the polynomial through the last
`order + 1` computed predictions, by Lagrange's formula, in a variable in which the steps need not be even:

    F(x) = sum_j F(x_j) prod_{k != j} (x - x_k) / (x_j - x_k)

The solver keeps its small steps, whose own error is not touched; taking fewer steps makes that error larger instead.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor, isfinite, prod
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from foley.accel.layers import Forward
from foley.core.numbers import COUNT, NumberRange
from foley.diffusion.context import AXES, RunContext, StepContext
from foley.diffusion.solver import CONSISTENCY

ORDER = NumberRange(least=0, most=5, whole=True)
QUANTITIES = ("auto", "prediction", "clean")
PLACES = ("guided", "branch")


def lagrange(nodes: Sequence[float], place: float) -> list[float]:
    """The weight of each node's value in the polynomial through all of them, at `place`; nodes must differ.

    >>> lagrange([0.0, 1.0, 3.0], 4.0)  # x^2 is reproduced: 0 * 1 + 1 * -2 + 9 * 2 = 16
    [1.0, -2.0, 2.0]
    """
    return [prod((place - other) / (node - other) for other in nodes if other != node) for node in nodes]


def interval_plan(num_evaluations: int, interval: float, warmup: int = 1) -> list[bool]:
    """Which evaluations compute: the first `warmup`, and from there every `interval`-th, on average where it is none.

    >>> interval_plan(6, 2)
    [True, False, True, False, True, False]
    >>> interval_plan(7, 1.5)
    [True, False, True, True, False, True, True]
    """
    after = [max(evaluation - warmup + 1, 0) for evaluation in range(num_evaluations)]  # of the warm-up
    return [not past or floor(past / interval) > floor((past - 1) / interval) for past in after]


class History:
    """The last `order + 1` computed values of one quantity, `[B, C, L]` each, and the polynomial through them."""

    def __init__(self, order: int) -> None:
        self._most = order + 1
        self._places: list[float] = []
        self._values: list[Tensor] = []

    def store(self, place: float, value: Tensor) -> None:
        """Remember; what was computed at the same place before is replaced (Heun evaluates twice at one)."""
        # Infinite is the log-SNR of pure noise: no polynomial goes through it, so it is held until there is another.
        if self._places and (self._places[-1] == place or not isfinite(self._places[-1])):
            del self._places[-1], self._values[-1]
        self._places = [*self._places, place][-self._most :]
        self._values = [*self._values, value][-self._most :]

    def at(self, place: float) -> Tensor:
        """The forecast, in the type of what was stored; of lower order while little is."""
        # Large weights of alternating sign: half precision would lose what is left of their sum.
        first, *others = zip(lagrange(self._places, place), self._values, strict=True)
        total = first[0] * first[1].float() if others else first[1]
        for weight, value in others:
            total = total.add(value.float(), alpha=weight)
        return total.to(first[1].dtype)


class PredictionReuse:
    """Compute the whole prediction at some evaluations, and extrapolate it at the others.

    Args:
        interval: compute every n-th evaluation, on average where it is no whole number; 1 computes always.
        order: of the polynomial: 0 holds the last prediction, 1 is a line, 2 a parabola.
        axis: what it is a polynomial in, see `RunContext.axis`.
        quantity: what is extrapolated, the "prediction", or the "clean" latent that it implies; of solvers that add
            noise the noisy latent jumps, and the prediction with it.
        at: "guided" is after guidance, where the loop asks for it, as ours does; "branch" replaces the denoiser's own
            output, of both guidance branches. Without a rescale of guidance both are the same.
        warmup: this many evaluations at the beginning are computed.
    """

    def __init__(
        self,
        interval: float = 3,
        order: int = 2,
        axis: str = "angle",
        quantity: str = "auto",
        at: str = "guided",
        warmup: int = 1,
    ) -> None:
        NumberRange(least=1).check("interval", interval)
        ORDER.check("order", order)
        COUNT.check("warmup", warmup)
        for name, value, known in (("axis", axis, AXES), ("quantity", quantity, QUANTITIES), ("at", at, PLACES)):
            if value not in known:
                raise ValueError(f"accel.{name} must be one of {', '.join(known)}, got {value!r}")
        self._interval, self._order, self._warmup = interval, order, warmup
        self._axis, self._quantity, self._at = axis, quantity, at
        self.computed_evaluations: list[bool] = []  # of the last run
        self._denoiser: nn.Module | None = None
        self._reset()

    def _reset(self) -> None:
        self._plan: list[bool] = []
        self._places: list[float] = []
        self._extrapolates_clean = False
        self._context: StepContext | None = None  # of the present evaluation; None outside of one
        self._is_asked = False  # whether the loop asks for forecasts
        self._noisy: Tensor | None = None  # what the guided prediction is of
        # Branches that run one after the other have memories of their own; a branch has one for each output.
        self._histories: dict[str, list[History]] = {}
        self._form: TreeSpec | None = None  # of the denoiser's output

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Stand before the denoiser inside the context, and be gone on any exit; RuntimeError where it does already."""
        if self._denoiser is not None:
            raise RuntimeError("this accelerator is attached to a denoiser already; give each of them its own")
        # What is compiled is called in the place of `forward`.
        name = "forward" if denoiser._compiled_call_impl is None else "_compiled_call_impl"
        own = vars(denoiser).get(name)  # offloading of diffusers sets a forward
        self._denoiser = denoiser
        setattr(denoiser, name, self._reusing(getattr(denoiser, name)))
        try:
            yield
        finally:
            vars(denoiser).pop(name)  # that of the class shows again
            if own is not None:
                setattr(denoiser, name, own)
            self._denoiser = None
            self._reset()

    def on_run_start(self, run: RunContext) -> None:
        """Raises ValueError for a student: its few evaluations are far apart, and each begins at fresh noise."""
        if run.solver == CONSISTENCY:
            raise ValueError(
                "accel=prediction has nothing to reuse in a student of consistency distillation: its few evaluations "
                "are too different from each other; leave accel out"
            )
        self._reset()
        self._places = run.axis(self._axis)
        self._extrapolates_clean = self._choose_clean(run)
        self._plan = interval_plan(run.num_evaluations, self._interval, self._warmup)
        self.computed_evaluations = [False] * run.num_evaluations

    def _choose_clean(self, run: RunContext) -> bool:
        if self._quantity == "clean" and run.clean_weights is None:
            raise ValueError("accel.quantity=clean: this loop does not say what its noise levels are; take prediction")
        return self._quantity == "clean" or (self._quantity == "auto" and run.adds_noise)

    def on_evaluation_start(self, context: StepContext) -> None:
        self._context = context
        # A run that begins in the middle of the plan has nothing to reuse yet.
        computes = self._plan[context.evaluation] or not any(self.computed_evaluations)
        self.computed_evaluations[context.evaluation] = computes

    def forecast(self, context: StepContext, noisy: Tensor) -> Tensor | None:
        """The guided prediction `[B, C, L]` of the present evaluation, or None where the denoiser has to compute it.

        Args:
            noisy: what the denoiser would be given, `[B, C, L]`.
        """
        if self._at != "guided":
            return None
        self._is_asked, self._noisy = True, noisy
        return None if self.computed_evaluations[context.evaluation] else self._recall("guided", noisy)[0]

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if self._is_asked and self.computed_evaluations[context.evaluation]:
            self._store("guided", self._noisy, [prediction])
        self._context = self._noisy = None

    def on_run_end(self) -> None:
        self._reset()

    def describe(self) -> dict[str, int]:
        """What the JSON of each clip says of the last run."""
        return {"computed_evaluations": sum(self.computed_evaluations)}

    def graph_pattern(self) -> str | None:
        """After guidance only what computes is recorded; stores before it would not happen in a replay."""
        return "prediction" if self._is_asked else None

    def _reusing(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._is_asked:
                return original(*args, **kwargs)
            if self._context is None:
                raise RuntimeError(
                    "PredictionReuse is attached, but the sampler does not call it: pass it as a callback"
                )
            branch, noisy = self._context.branch, args[0] if args else None
            if not self.computed_evaluations[self._context.evaluation]:
                assert self._form is not None
                return tree_unflatten(self._recall(branch, noisy), self._form)
            output = original(*args, **kwargs)
            leaves, self._form = tree_flatten(output)
            self._store(branch, noisy, leaves)
            return output

        return forward

    def _store(self, branch: str, noisy: Any, values: Sequence[Tensor]) -> None:
        """`values` of the present evaluation: one, or all that the denoiser gives."""
        histories = self._histories.setdefault(branch, [History(self._order) for _ in values])
        for history, value in zip(histories, values, strict=True):
            if self._extrapolates_clean:
                of_noisy, of_prediction = self._clean_weights()
                value = of_noisy * noisy + of_prediction * value
            history.store(self._place(), value)

    def _recall(self, branch: str, noisy: Any) -> list[Tensor]:
        forecasts = [history.at(self._place()) for history in self._histories[branch]]
        if not self._extrapolates_clean:
            return forecasts
        of_noisy, of_prediction = self._clean_weights()
        return [(forecast - of_noisy * noisy) / of_prediction for forecast in forecasts]

    def _place(self) -> float:
        assert self._context is not None
        return self._places[self._context.evaluation]

    def _clean_weights(self) -> tuple[float, float]:
        """The clean latent is the first times the noisy one and the second times the prediction."""
        assert self._context is not None
        weights = self._context.run.clean_weights
        assert weights is not None  # or the run would have been refused
        of_noisy, of_prediction = weights[self._context.evaluation].tolist()
        return of_noisy, of_prediction
