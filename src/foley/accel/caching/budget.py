"""A budget: the schedule of least summed change whose multiply-accumulates are those of a chosen speed-up.

Not published. AudioCache and SmoothCache are given a tolerance, and the speed-up is what comes out; here it is the
other way round. The error of reusing at s what was computed at c is how far the calibrated curve has come in between:
the sum of its changes (AudioCache, eq. 1) from c + 1 to s. That of a schedule is the sum over layers and evaluations.
"""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from foley.accel.caching.calibration import CalibratedCache, CalibratedOptions, Calibration
from foley.accel.caching.knapsack import least_error
from foley.accel.caching.reuse import ReuseChoice
from foley.accel.caching.schedule import UNCONSTRAINED, Constraints
from foley.core.numbers import NumberRange, check_choice

Curves = Mapping[str, Sequence[float]]
"""For each layer, its change at each of the E evaluations since the one before; the first value is ignored."""

Rows = dict[str, list[bool]]
"""For each layer, true at the evaluations where it computes."""

Intervals = Mapping[str, NDArray[np.float64]]
"""For each layer at `[c, e]`, `[E, E + 1]`, the error of computing at c and reusing until it computes again at e."""


def budget_schedule(
    changes: Curves,
    layer_macs: Mapping[str, int],
    total_macs: int,
    target_speedup: float,
    method: str = "dynamic",
    constraints: Constraints = UNCONSTRAINED,
) -> Rows:
    """Decisions for each layer, true where it computes, whose MACs are at most `1 / target_speedup` of the uncached.

    Args:
        changes: for each layer, its change at each evaluation since the one before; the first value is ignored.
        layer_macs: of one call of each layer.
        total_macs: of one uncached evaluation of the whole denoiser.
        target_speedup: uncached MACs over MACs; 1 computes always.
        method: "dynamic" finds the best schedule there is: of each layer for every number of computations by dynamic
            programming, and the numbers by `foley.accel.caching.knapsack`; "greedy" starts from computing always, and
            drops whichever computation costs least error for its MACs, one by one.
        constraints: what computes in any case, within the same budget.

    Raises ValueError for an unknown method, and for a speed-up out of reach: what is not cacheable always computes, and
    each layer computes once, or as often as the constraints have it.

    Example:
        Half of the four evaluations of the only layer; the large change at the end is worth a computation.

        >>> budget_schedule({"0.feed_forward": [0.0, 0.1, 0.1, 0.9]}, {"0.feed_forward": 100}, 100, target_speedup=2)
        {'0.feed_forward': [True, False, False, True]}
    """
    intervals = {layer: _interval_errors(curve) for layer, curve in changes.items()}
    return spend_budget(intervals, layer_macs, total_macs, target_speedup, method, constraints)


def spend_budget(
    intervals: Intervals,
    layer_macs: Mapping[str, int],
    total_macs: int,
    target_speedup: float,
    method: str = "dynamic",
    constraints: Constraints = UNCONSTRAINED,
) -> Rows:
    """As `budget_schedule`, of any errors of reuse that sum up over layers and intervals."""
    methods = {"dynamic": _dynamic, "greedy": _greedy}
    check_choice("accel.method", method, methods)
    num_evaluations, fewest = len(next(iter(intervals.values()))), _fewest(constraints, intervals)
    layers = sum(layer_macs[layer] for layer in intervals)
    # MACs that the layers may take in all: those of the whole run, less what no schedule can save.
    budget = num_evaluations * (total_macs / target_speedup - (total_macs - layers))
    if target_speedup < 1 or budget < fewest * layers * (1 - 1e-12):
        uncached = num_evaluations * total_macs  # everything computed always
        largest = uncached / (uncached - (num_evaluations - fewest) * layers)
        raise ValueError(f"accel.target_speedup must lie between 1 and {largest:.3g} here, got {target_speedup:g}")
    allowed = {layer: _constrained(errors, constraints) for layer, errors in intervals.items()}
    return methods[method](allowed, layer_macs, budget)


def _fewest(constraints: Constraints, intervals: Intervals) -> int:
    """Computations of each layer that the constraints leave."""
    size, last, count = len(next(iter(intervals.values()))), 0, 1
    while (last := constraints.next_due(last, size)) < size:
        count += 1
    return count


def _constrained(errors: NDArray[np.float64], constraints: Constraints) -> NDArray[np.float64]:
    """With the intervals that hold what must be computed infinitely dear."""
    errors = errors.copy()
    for start, row in enumerate(errors):
        row[constraints.next_due(start, len(errors)) + 1 :] = np.inf
    return errors


def schedule_error(changes: Curves, rows: Mapping[str, Sequence[bool]]) -> float:
    """The summed change of a schedule: over its layers, and over the intervals from one computation to the next."""
    return summed_error({layer: _interval_errors(changes[layer]) for layer in rows}, rows)


def summed_error(intervals: Intervals, rows: Mapping[str, Sequence[bool]]) -> float:
    """As `schedule_error`, of any errors of reuse."""
    return sum(
        float(intervals[layer][start, end])
        for layer, row in rows.items()
        for start, end in pairwise([*np.flatnonzero(row), len(row)])
    )


def _interval_errors(curve: Sequence[float]) -> NDArray[np.float64]:
    """`[E, E + 1]`: at `[c, e]` the error of computing at c and reusing until e, where the next computation is."""
    position = np.concatenate([[0.0], np.cumsum(np.asarray(curve, dtype=np.float64)[1:])])  # [E], from evaluation 0
    drift = np.maximum(position[None, :] - position[:, None], 0.0)  # [E, E]: of the output of c, reused at s
    drift[np.tril_indices(len(position))] = 0.0  # nothing is reused before it is computed
    # Summed over s from c + 1 to e - 1.
    return np.concatenate([np.zeros((len(position), 1)), np.cumsum(drift, axis=1)], axis=1)


def sensitivity_intervals(table: NDArray[np.floating[Any]], coherent: bool = True) -> NDArray[np.float64]:
    """`[E, E + 1]` as `Intervals` has it, of one layer's sensitivities `[distances, E]` (`SensitivityRecorder`).

    The errors of one output's reuses point the same way, since all of them lag behind: theirs is the square of the sum.
    Those of different outputs are taken to be independent, so that their squares sum up; so are all where not
    `coherent`. Beyond the recorded distances errors go on in proportion to the distance.
    """
    most, size = table.shape
    errors = np.zeros((size, size + 1))
    for start in range(size):
        distances = np.arange(1, size - start)
        known = table[np.minimum(distances, most) - 1, start + distances]
        # Reused at start + 1, start + 2 and so on until the end of the interval.
        reuses = known * np.maximum(distances / most, 1.0)
        # An output that is held lags behind at each of its reuses, so that their errors do not cancel.
        errors[start, start + 2 :] = np.cumsum(reuses) ** 2 if coherent else np.cumsum(reuses**2)
    return errors


def _dynamic(intervals: Intervals, layer_macs: Mapping[str, int], budget: float) -> Rows:
    """Each layer's best schedule for every number of computations; then the best numbers, `least_error`."""
    plans = {layer: _best_for_every_count(errors) for layer, errors in intervals.items()}
    counts = least_error({layer: errors for layer, (errors, _) in plans.items()}, layer_macs, budget)
    return {layer: _backtrack(plans[layer][1], count) for layer, count in counts.items()}


def _best_for_every_count(intervals: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """For n = 1..E computations: the least error, and for each end the last computation that attains it.

    By dynamic programming: the best schedule of n + 1 computations until e is, for some c, the best of n until c and
    then a computation at c, whose output is reused until e.
    """
    size = len(intervals)
    # [E, E + 1]: an interval ends after it begins.
    allowed = np.where(np.arange(size)[:, None] < np.arange(size + 1)[None, :], intervals, np.inf)
    # best[e]: the error of n computations until e, of which the first is at 0. The run ends at e = E.
    best, least, choices = allowed[0], [allowed[0, -1]], [np.zeros(size + 1, dtype=np.int64)]
    for _ in range(size - 1):
        candidates = best[:size, None] + allowed  # [c, e]
        choices.append(candidates.argmin(axis=0))  # the best c, for each e
        best = candidates.min(axis=0)
        least.append(best[-1])  # the run's end, e = E
    return np.asarray(least), choices


def _backtrack(choices: list[NDArray[np.int64]], count: int) -> list[bool]:
    """The schedule of `count` computations: its last one, from the end of the run, then the one before, and so on."""
    row, end = [False] * (len(choices[0]) - 1), len(choices[0]) - 1
    for choice in reversed(choices[:count]):  # the last computation before `end`
        end = int(choice[end])
        row[end] = True
    return row


def _greedy(intervals: Intervals, layer_macs: Mapping[str, int], budget: float) -> Rows:
    """Begin with everything computed; drop what costs least error for the MACs it saves, until the budget is met."""
    size = len(next(iter(intervals.values())))
    rows = {layer: [True] * size for layer in intervals}
    spent = float(sum(layer_macs[layer] * size for layer in intervals))  # MACs of all layer calls

    def price(layer: str, evaluation: int) -> tuple[float, str, int]:
        previous, following = _neighbours(rows[layer], evaluation)
        table = intervals[layer]
        # One long interval in the place of two short ones.
        added = table[previous, following] - table[previous, evaluation] - table[evaluation, following]
        return float(added) / layer_macs[layer], layer, evaluation

    queue = [price(layer, evaluation) for layer in intervals for evaluation in range(1, size)]
    heapify(queue)
    while spent > budget * (1 + 1e-12):  # what was computed in other orders may differ by rounding
        offered, layer, evaluation = heappop(queue)
        current = price(layer, evaluation)
        if current[0] > offered:  # a neighbour was dropped since, which makes this one dearer, never cheaper
            heappush(queue, current)
            continue
        rows[layer][evaluation] = False
        spent -= layer_macs[layer]
    return rows


def _neighbours(row: Sequence[bool], evaluation: int) -> tuple[int, int]:
    """The computations before and after; the end of the run where none follows."""
    previous = next(index for index in range(evaluation - 1, -1, -1) if row[index])
    return previous, next((index for index in range(evaluation + 1, len(row)) if row[index]), len(row))


class Budget(CalibratedCache):
    """The schedule of least summed change whose multiply-accumulates are those of `target_speedup`.

    Args:
        calibration_dir, reuse, options: as `CalibratedCache` takes them.
        target_speedup: uncached multiply-accumulates over those of the run; 1 computes always.
        method: "dynamic" or "greedy", see `budget_schedule`.

    Example: as that of `foley.accel.caching.audiocache.AudioCache`, with `Budget(folder.name, target_speedup=1.2)`.

        >>> from foley.accel import Budget
        >>> cache = Budget("no such folder", target_speedup=2)
        >>> cache.require_calibration("ddim", 50, guidance_scale=3.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such folder/ddim_50.json does not exist: this system is not calibrated ...
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        target_speedup: float,
        method: str = "dynamic",
        reuse: ReuseChoice = "hold",
        **options: Unpack[CalibratedOptions],
    ) -> None:
        policy = {"name": "budget", "target_speedup": target_speedup, "method": method}
        super().__init__(calibration_dir, policy, reuse, **options)
        NumberRange(least=1).check("target_speedup", target_speedup)
        self._target_speedup = target_speedup
        self._method = method

    def decide(self, calibration: Calibration) -> dict[str, list[bool]]:
        """All layers together, see `budget_schedule`."""
        macs = calibration.macs
        if self.objective == "sensitivity":
            tables = dict(zip(calibration.layer_names, calibration.mean, strict=True))
            intervals = {layer: sensitivity_intervals(table.numpy()) for layer, table in tables.items()}
        else:
            intervals = {layer: _interval_errors(curve) for layer, curve in calibration.changes().items()}
        options = self._target_speedup, self._method, self.constraints
        return spend_budget(intervals, macs.layers, macs.total, *options)
