"""Prediction reuse: at chosen evaluations the denoiser does not run, and its output is extrapolated from earlier ones.

What a denoiser predicts along one path is a smooth function of the noise level, much smoother than a solver's few steps
would need it. So of the evaluations of a run only some are computed; in between stands the polynomial through the last
`order + 1` computed predictions, by Lagrange's formula, in a variable in which the steps need not be even:

    F(x) = sum_j F(x_j) prod_{k != j} (x - x_k) / (x_j - x_k)

The solver keeps its small steps, whose own error is not touched; taking fewer steps makes that error larger instead.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import pi, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from foley.accel.caching.calibration import CALIBRATE, WantedCurves, find_kept, homes, keep
from foley.accel.caching.prediction_calibration import CovarianceRecorder, PredictionCovariance, extrapolates_clean
from foley.accel.caching.prediction_plans import (
    Fitted,
    angle_weights,
    capped,
    interval_plan,
    optimal_plan,
)
from foley.accel.caching.reuse import Taylor, weighted
from foley.accel.caching.schedule import RunSignature
from foley.accel.layers import Forward, entry_of, replaced
from foley.core.numbers import COUNT, NumberRange, check_choice
from foley.diffusion.context import AXES, CONSISTENCY, RunContext, StepContext

ORDER = NumberRange(least=0, most=3, whole=True)
MAX_REUSES = NumberRange(least=1, most=15, whole=True)
QUANTITIES = ("auto", "prediction", "clean")
PLACES = ("guided", "branch")


class History:
    """The last computed values of one quantity, `order + 1` tensors of one shape, and what they make of another place.

    Args:
        places: `[E]`, where evaluations lie on the axis of the polynomial.
        fitted: makes its weights instead of the polynomial.
    """

    def __init__(self, places: Sequence[float], order: int, fitted: Fitted | None = None) -> None:
        self._places = places
        self._fitted = fitted
        self._memory = Taylor(order)
        self._evaluations: dict[float, int] = {}  # the last one at each place, which alone the memory keeps

    def store(self, evaluation: int, value: Tensor) -> None:
        """Remember; what was computed at the same place before is replaced (Heun evaluates twice at one)."""
        self._memory.store(self._places[evaluation], value)
        self._evaluations[self._places[evaluation]] = evaluation

    @property
    def is_filled(self) -> bool:
        """Whether there is anything to forecast from."""
        return bool(self._memory.nodes)

    def at(self, evaluation: int) -> Tensor:
        """The forecast, in the type of what was stored; of lower order while little is."""
        if self._fitted is None:
            polynomial: Tensor = self._memory.recall(self._places[evaluation])
            return polynomial
        places, values = zip(*self._memory.nodes, strict=True)
        nodes = np.array([[self._evaluations[place] for place in places]])
        return weighted(self._fitted.shares(nodes, np.array([[evaluation]]))[0].tolist(), *values)

    def remainder(self, evaluation: int) -> tuple[int, float]:
        """Of the interpolation: the number of nodes, and the product of their distances, which the error goes by."""
        place = self._places[evaluation]
        return len(self._memory.nodes), abs(prod(place - node for node, _ in self._memory.nodes))


class Threshold:
    """What a skipped evaluation may be wrong by, from what the last forecast was wrong by where it was computed too.

    The remainder of a polynomial through n nodes is a derivative times `prod_j (x - x_j)`. So the error measured at the
    last computed evaluation tells the derivative, and that the errors to come, while the number of nodes stays.
    """

    def __init__(self, threshold: float, weights: Sequence[float]) -> None:
        self._threshold = threshold
        self._weights = weights
        self._measured: tuple[float, int, float] | None = None  # error, number of nodes, product of their distances
        self._spent = 0.0  # since the last computed evaluation, in units of the latent
        # Early on predictions turn sharply, and one measured error says little of many evaluations ahead: gaps grow by
        # one at a time.
        self._skipped, self._longest = 0, 1
        self.differences: list[float | None] = [None] * len(weights)

    def lets_skip(self, evaluation: int, remainder: tuple[int, float]) -> bool:
        """Whether all errors since the last computed evaluation, this one's included, stay below the threshold."""
        if self._measured is None or self._skipped >= self._longest:
            return False
        error, count, distance = self._measured
        growth = remainder[1] / distance if remainder[0] == count else 1.0
        self._spent += self._weights[evaluation] * error * growth
        is_within = self._spent <= self._threshold
        self._skipped += is_within
        return is_within

    def measure(self, evaluation: int, forecast: Tensor, computed: Tensor, remainder: tuple[int, float]) -> None:
        """The relative error of a forecast `[B, C, L]` where it was computed all the same; waits for the device."""
        error = float((forecast - computed).float().norm() / computed.float().norm())
        if self.differences[evaluation] is None:  # the first branch of an evaluation
            self._skipped, self._longest = 0, self._skipped + 1
        # Branches that run one after the other are skipped together, so the worse of them decides.
        error = max(error, self.differences[evaluation] or 0.0)
        self.differences[evaluation] = error
        # At the place of the last node the forecast is the node: nothing is learnt there.
        if remainder[1] > 0:
            self._measured = error, *remainder
        self._spent = 0.0


class PredictionReuse:
    """Compute the whole prediction at some evaluations, and extrapolate it at the others.

    Args:
        interval: compute every n-th evaluation, on average where it is no whole number; 1 computes always.
        order: of the polynomial: 0 holds the last prediction, 1 is a line, 2 a parabola.
        axis: what it is a polynomial in, see `RunContext.axis`. On the demo system, with DDIM and DPM++ 2M in 50 steps,
            the angle and the timestep serve about alike; with DDIM, the log-SNR was up to 1.8 times as far off.
        quantity: what is extrapolated, the "prediction", or the "clean" latent that it implies; of solvers that add
            noise the noisy latent jumps, and the prediction with it.
        at: "guided" is after guidance, where the loop asks for it, as ours does; "branch" replaces the denoiser's own
            output, of both guidance branches. Without a rescale of guidance both are the same.
        warmup: this many evaluations at the beginning are computed.
        max_reuses: this many evaluations in a row are skipped at most.
        target_speedup: compute where it serves best instead, as many evaluations as this many times faster allows, by
            the calibrated covariance of the predictions (`foley.accel.caching.prediction_plans`). What is skipped
            is the best linear forecast from `order + 1` computed ones, instead of a polynomial.
        threshold: decide on the way instead, by the error that was measured, in gaps that grow by one; the largest that
            one may leave in the latent, relative to it. `interval` has no effect then.
        calibration_dir, calibrate: where the covariance is kept, and whether it is made where it is missing, as
            `CalibratedCache` takes them; of `target_speedup` alone.

    Raises ValueError, which names the option, for what is out of its range.

    After a run, `computed_evaluations` says which were computed, and `differences` how wrong the forecasts were that
    were computed too, where there is a threshold; None at the others.

    Example:
        >>> import torch
        >>> from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
        >>> from foley.diffusion.process import DiffusionProcess
        >>> from foley.diffusion.sampler import generate_latents
        >>> from foley.diffusion.solver import Solver
        >>> from foley.models.dit.model import DiffusionTransformer
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval()
        >>> text = Conditioning(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        >>> guidance, solver = ClassifierFreeGuidance(3.0), Solver("ddim", 6)

        >>> from foley.accel import PredictionReuse
        >>> reuse, process = PredictionReuse(interval=3), DiffusionProcess("v")
        >>> latent = generate_latents(denoiser, process, text, text, [0], 20, guidance, solver, accelerator=reuse)
        >>> reuse.computed_evaluations
        [True, False, True, False, False, True]
    """

    def __init__(
        self,
        interval: float = 3,
        order: int = 2,
        axis: str = "angle",
        quantity: str = "auto",
        at: str = "guided",
        warmup: int = 1,
        max_reuses: int = 7,
        target_speedup: float | None = None,
        threshold: float | None = None,
        calibration_dir: str | Path | None = None,
        calibrate: str = "never",
    ) -> None:
        NumberRange(least=1).check("interval", interval)
        ORDER.check("order", order)
        COUNT.check("warmup", warmup)
        MAX_REUSES.check("max_reuses", max_reuses)
        for name, value, least in (("threshold", threshold, 0), ("target_speedup", target_speedup, 1)):
            if value is not None:
                NumberRange(least=least).check(name, value)
        if threshold is not None and target_speedup is not None:
            raise ValueError("accel.threshold and accel.target_speedup exclude each other: give one of them")
        if target_speedup is not None and calibration_dir is None:
            raise ValueError("accel.target_speedup needs accel.calibration_dir, where calibrations are kept")
        check_choice("accel.axis", axis, AXES)
        check_choice("accel.quantity", quantity, QUANTITIES)
        check_choice("accel.at", at, PLACES)
        check_choice("accel.calibrate", calibrate, CALIBRATE)
        self._max_reuses, self._threshold, self._target_speedup = max_reuses, threshold, target_speedup
        self._interval, self._order, self._warmup = interval, order, warmup
        self._axis, self._quantity, self._at = axis, quantity, at
        self._directory, self._calibrate = Path(calibration_dir or "."), calibrate
        self._adopted: PredictionCovariance | None = None
        self.computed_evaluations: list[bool] = []  # of the last run
        self.differences: list[float | None] = []  # of the forecasts that were computed too, where there is a threshold
        self._denoiser: nn.Module | None = None
        self._reset()

    def _reset(self) -> None:
        self._plan: Sequence[bool] | None = None  # from the first evaluation of the run on
        # Of one run: what it has measured says nothing of the next prompt.
        self._guard: Threshold | None = None
        self._fitted: Fitted | None = None
        self._places: list[float] = []
        self._extrapolates_clean = False
        self._context: StepContext | None = None  # of the present evaluation; None outside of one
        self._decided: int | None = None  # the last evaluation that was decided about
        self._is_asked = False  # whether the loop asks for forecasts
        self._noisy: Tensor | None = None  # what the guided prediction is of
        # Branches that run one after the other have memories of their own, and so have the stretches of a run between
        # which guidance begins or ends, where a prediction jumps; a branch has one for each output.
        self._histories: dict[str, list[History]] = {}
        self._form: TreeSpec | None = None  # of the denoiser's output

    @property
    def decides_by_batch(self) -> bool:
        """Whether errors that are measured on the way decide, see `foley.accel.combined.decides_by_batch`."""
        return self._threshold is not None

    @property
    def calibrates(self) -> bool:
        """Whether whoever generates is to make the calibration where it is missing."""
        return self._target_speedup is not None and self._calibrate == "auto"

    def recorder(self) -> CovarianceRecorder:
        """What makes the calibration."""
        return CovarianceRecorder(self._quantity)

    def wanted(self, model_hash: str, solver: str, num_steps: int, guidance_scale: float) -> WantedCurves:
        """The run whose predictions' covariance such a run needs."""
        return WantedCurves(model_hash, solver, num_steps, guidance_scale)

    def find(self, wanted: WantedCurves) -> PredictionCovariance | None:
        """That of just such a run; what is damaged is warned of and left."""
        return find_kept(PredictionCovariance.load, self._homes(wanted), wanted)

    def keep(self, calibration: PredictionCovariance, wanted: WantedCurves) -> Path:
        """Write it beside the system, or into the cache folder where that cannot be written; returns where."""
        return keep(calibration, self._homes(wanted))

    def adopt(self, calibration: PredictionCovariance) -> None:
        """Take this one for the runs to come."""
        self._adopted = calibration

    def require_calibration(self, solver: str | None, num_steps: int | None, guidance_scale: float | None) -> None:
        """Nothing is known to be missing before the run is."""

    def _homes(self, wanted: WantedCurves) -> tuple[Path, Path]:
        # "auto" is the clean latent of some solvers: a file of its own, or it would be taken for the prediction there.
        chosen = "" if self._quantity == "auto" else f"{self._quantity}_"
        return homes(self._directory, wanted, f"prediction_{chosen}")

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Stand before the denoiser inside the context, and be gone on any exit; RuntimeError where it does already."""
        if self._denoiser is not None:
            raise RuntimeError("this accelerator is attached to a denoiser already; give each of them its own")
        entry = entry_of(denoiser)
        with replaced(denoiser, entry, self._reusing(getattr(denoiser, entry))):
            self._denoiser = denoiser
            try:
                yield
            finally:
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
        self._extrapolates_clean = extrapolates_clean(run, self._quantity)
        self.computed_evaluations = [False] * run.num_evaluations
        if self._threshold is not None:
            self._guard = Threshold(self._threshold, angle_weights(_angles(run)).tolist())
            self.differences = self._guard.differences

    def on_evaluation_start(self, context: StepContext) -> None:
        is_first = context.evaluation != self._decided
        self._context, self._decided = context, context.evaluation
        # Where branches run one after the other this is called for each: the first decides for all, but for one that
        # has nothing to recall.
        computes = self._computes(context) if is_first else context.branch not in self._histories
        self.computed_evaluations[context.evaluation] |= computes

    def _computes(self, context: StepContext) -> bool:
        evaluation = context.evaluation
        if not any(self.computed_evaluations):  # nothing to reuse yet, also in a run that begins in the middle
            self._plan = (False,) * evaluation + self._planned(context.run, evaluation)
        assert self._plan is not None
        if context.branch not in self._histories:  # a branch that begins in mid-run
            return True
        if self._guard is None:
            return self._plan[evaluation]
        # What is wrong at the last evaluation stays, and its step is the longest.
        if evaluation == context.run.num_evaluations - 1:
            return True
        # No forecast is known to be good before one was measured, and none may go unmeasured for long.
        since_warmup = evaluation - self.computed_evaluations.index(True) if any(self.computed_evaluations) else 0
        if since_warmup < self._warmup or not any(self.computed_evaluations[max(evaluation - self._max_reuses, 0) :]):
            return True
        history = self._histories[context.branch][0]
        return not self._guard.lets_skip(evaluation, history.remainder(evaluation))

    def _planned(self, run: RunContext, first: int) -> tuple[bool, ...]:
        """Of the evaluations from `first` on."""
        left = run.num_evaluations - first
        if self._target_speedup is None:
            return tuple(capped(interval_plan(left, self._interval, self._warmup), self._max_reuses))
        weights, covariance = angle_weights(_angles(run)), self._covariance(run)
        if self._extrapolates_clean:
            assert run.clean_weights is not None
            # The covariance is of clean latents then, and an error there is a larger one of the prediction.
            weights = weights / np.abs(run.clean_weights[:, 1].numpy())
        self._fitted = Fitted(self._order, weights, covariance)
        # A run that begins in the middle has no evaluations before: the plan is of those that are left, the weights of
        # the forecasts go on by the numbers of the whole run.
        from_first = Fitted(self._order, weights[first:], covariance[first:, first:])
        count = max(int(left / self._target_speedup), 1)
        return tuple(optimal_plan(from_first, count, self._warmup, self._max_reuses))

    def _covariance(self, run: RunContext) -> NDArray[np.float64]:
        assert self._denoiser is not None
        signature = RunSignature.of(run, self._denoiser)
        wanted = self.wanted(signature.model_hash, run.solver, run.num_steps, run.guidance_scale)
        is_adopted = self._adopted is not None and wanted.served_by(self._adopted)
        calibration = self._adopted if is_adopted else self.find(wanted)
        if calibration is None:
            raise FileNotFoundError(
                f"accel.target_speedup: {self._directory} holds no calibration of the predictions of {wanted.name}; "
                "let it be made (accel.calibrate=auto), or give accel.interval instead"
            )
        calibration.signature.require(signature, "the calibration of predictions")
        return calibration.covariance.numpy()

    def forecast(self, context: StepContext, noisy: Tensor) -> Tensor | None:
        """The guided prediction `[B, C, L]` of the present evaluation, or None where the denoiser has to compute it.

        Args:
            noisy: what the denoiser would be given, `[B, C, L]`.
        """
        if self._at != "guided":
            return None
        self._is_asked, self._noisy = True, noisy
        return None if self.computed_evaluations[context.evaluation] else self._recall(context.branch, noisy)[0]

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if self._is_asked and self.computed_evaluations[context.evaluation]:
            self._store(context.branch, self._noisy, [prediction])
        # Outside of an evaluation nothing may be stored, and a noisy latent need not be kept alive.
        self._context = self._noisy = None

    def on_run_end(self) -> None:
        self._reset()

    def describe(self) -> dict[str, Any]:
        """What the JSON of each clip says of the last run."""
        computed = [evaluation for evaluation, computes in enumerate(self.computed_evaluations) if computes]
        measured = [round(difference, 4) for difference in self.differences if difference is not None]
        return {"computed_evaluations": computed} | ({"prediction_differences": measured} if measured else {})

    def graph_pattern(self) -> str | None:
        """After guidance only what computes is recorded; stores before it would not happen in a replay."""
        return "prediction" if self._is_asked else None

    def _reusing(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # The loop has asked for a forecast and got none: what it calls has to compute.
            if self._is_asked:
                return original(*args, **kwargs)
            if self._context is None:
                raise RuntimeError(
                    "PredictionReuse is attached, but the sampler does not call it: pass it as a callback"
                )
            # Transformers of diffusers call it `hidden_states`, U-Nets `sample`.
            branch, noisy = self._context.branch, next(iter((*args, *kwargs.values())))
            if not self.computed_evaluations[self._context.evaluation]:
                assert self._form is not None
                return tree_unflatten(self._recall(branch, noisy), self._form)
            output = original(*args, **kwargs)
            # Models of diffusers give a tuple or a named output: each tensor is extrapolated, the form is kept.
            leaves, self._form = tree_flatten(output)
            self._store(branch, noisy, leaves)
            return output

        return forward

    def _store(self, branch: str, noisy: Any, values: Sequence[Tensor]) -> None:
        """`values` of the present evaluation: one, or all that the denoiser gives."""
        assert self._context is not None
        evaluation = self._context.evaluation
        fresh = [History(self._places, self._order, self._fitted) for _ in values]
        histories = self._histories.setdefault(branch, fresh)
        for history, value in zip(histories, values, strict=True):
            if self._extrapolates_clean:
                of_noisy, of_prediction = self._clean_weights()
                value = of_noisy * noisy + of_prediction * value
            if self._guard is not None and history.is_filled:
                # Before it is stored: afterwards the polynomial goes through it, and its error would be 0.
                self._guard.measure(evaluation, history.at(evaluation), value, history.remainder(evaluation))
            history.store(evaluation, value)

    def _recall(self, branch: str, noisy: Any) -> list[Tensor]:
        assert self._context is not None
        forecasts = [history.at(self._context.evaluation) for history in self._histories[branch]]
        if not self._extrapolates_clean:
            return forecasts
        of_noisy, of_prediction = self._clean_weights()
        return [(forecast - of_noisy * noisy) / of_prediction for forecast in forecasts]

    def _clean_weights(self) -> tuple[float, float]:
        """The clean latent is the first times the noisy one and the second times the prediction."""
        assert self._context is not None
        weights = self._context.run.clean_weights
        assert weights is not None  # or the run would have been refused
        of_noisy, of_prediction = weights[self._context.evaluation].tolist()
        return of_noisy, of_prediction


def _angles(run: RunContext) -> NDArray[np.float64]:
    """`[E]`; where the noise levels are not known, timesteps on the same scale."""
    angles = np.asarray(run.axis("angle"))
    return angles if run.log_snr is not None else angles * (pi / 2 / max(np.abs(angles).max(), 1e-9))
