"""Which evaluations to compute, when the others are extrapolated: every n-th, or the plan of least expected error.

A forecast is linear in what was computed, F(e) ~ sum_j l_j F(x_j). So the error that the evaluations skipped in
one gap leave in the latent is linear in the predictions too, and its mean square is a quadratic form of their
covariance `<F(e), F(f)>`, `[E, E]`. Each prediction weighs as much as the solver makes of it: the angle to the next
evaluation, since v is the derivative of the noisy latent by the angle.

With a covariance at hand, dynamic programming finds the plan of least error for a number of computed evaluations. It is
exact for the sum over gaps: what a gap costs follows from its length and the last `order + 1` computed evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_RIDGE = 1e-6  # beside a mean square of 1


def interval_plan(num_evaluations: int, interval: float, warmup: int = 1) -> list[bool]:
    """Which evaluations compute: the first `warmup`, the last, and every `interval`-th before that, on average.

    The last step is the longest in angle, and what is wrong there stays: an error of it weighs most.

    >>> interval_plan(6, 2)
    [True, True, False, True, False, True]
    >>> interval_plan(7, 1.5)
    [True, True, False, True, True, False, True]
    """
    left = range(num_evaluations - 1, -1, -1)  # evaluations to come, after each
    chosen = [not after or floor(after / interval) > floor((after - 1) / interval) for after in left]
    return [True] * min(warmup, num_evaluations) + chosen[warmup:]


def capped(plan: Sequence[bool], max_reuses: int) -> list[bool]:
    """The plan, and whatever else must compute so that no more than `max_reuses` evaluations in a row are skipped.

    >>> capped([True, False, False, False, True], 2)
    [True, False, False, True, True]
    """
    skipped, result = 0, []
    for computes in plan:
        skipped = 0 if computes or skipped == max_reuses else skipped + 1
        result.append(skipped == 0)
    return result


def angle_weights(angles: Floats) -> Floats:
    """What each prediction weighs in the latent, `[E]`: the angle to the next evaluation, of the last to the end."""
    return np.abs(np.diff(np.append(angles, 0.0)))


@dataclass(frozen=True, eq=False)
class Fitted:
    """Skipped evaluations filled in by whatever combination of computed ones comes nearest on average.

    The best linear forecast (kriging), by the covariance: where the prediction turns within a few evaluations, a
    polynomial overshoots.

    Args:
        order: one less than the computed evaluations that a forecast looks at.
        weights: `[E]`, of each prediction in the latent.
        covariance: `[E, E]`, of the predictions.
    """

    order: int
    weights: Floats
    covariance: Floats

    def gap_errors(self, last: NDArray[np.int64], gaps: Sequence[int], longest: int) -> Floats:
        """The mean square error in the latent of each gap after `last [C]`, of 1 to `longest` evaluations, `[C, G]`.

        A gap of one skips nothing. The computed evaluations before lie `gaps` apart, the newest gap first; 0 ends them.
        What goes beyond the run's ends is infinite.
        """
        size = len(self.weights)
        steps = np.cumsum([0, *gaps[: gaps.index(0)]] if 0 in gaps else [0, *gaps])[: self.order + 1]
        nodes = last[:, None] - steps  # [C, order + 1]
        errors = np.where(nodes.min(axis=1) < 0, np.inf, 0.0)[:, None].repeat(longest, axis=1)  # [C, G]
        nodes, shares, members = nodes.clip(0), np.zeros(nodes.shape), [nodes.clip(0)]
        parts = [shares]
        for length in range(1, longest):  # one more skipped each time
            skipped = (last + length)[:, None]  # [C, 1]
            weight = self.weights[skipped.clip(max=size - 1)]
            # What is skipped adds its own prediction to the error, and takes away the shares of the nodes instead.
            parts[0] = parts[0] - weight * self.shares(nodes, skipped.clip(max=size - 1))
            members, parts = [*members, skipped.clip(max=size - 1)], [*parts, weight]
            at, of = np.concatenate(members, axis=1), np.concatenate(parts, axis=1)  # [C, nodes and skipped]
            # Rounding can take the square of what is forecast exactly below zero.
            squares = np.einsum("ci,cij,cj->c", of, self.covariance[at[:, :, None], at[:, None, :]], of)
            errors[:, length] += np.where(last + length < size, squares.clip(0), np.inf)
        return errors

    def shares(self, nodes: NDArray[np.int64], skipped: NDArray[np.int64]) -> Floats:
        """Of the values at `nodes [C, n]` in the forecast at `skipped [C, 1]`: least squares, hardly held back."""
        among = self.covariance[nodes[:, :, None], nodes[:, None, :]]  # [C, n, n]
        ridge = _RIDGE * np.eye(nodes.shape[1])  # predictions are nearly alike, and those of few prompts are known
        return np.asarray(
            np.linalg.solve(among + ridge, self.covariance[nodes, skipped][:, :, None])[:, :, 0], np.float64
        )


def optimal_plan(fitted: Fitted, count: int, warmup: int = 1, max_reuses: int = 7) -> list[bool]:
    """The plan of `count` computed evaluations, the first `warmup` among them, whose gaps leave least error in sum.

    At most `max_reuses` evaluations in a row are skipped; where that takes more than `count`, as many as it takes.
    """
    size, depth = len(fitted.weights), max(fitted.order, 1)
    longest = min(max_reuses + 1, size)
    # A state is the last computed evaluation and the gaps before it, the newest first, 0 where there were none.
    errors = np.full((size, *(longest + 1,) * depth, longest), np.inf)
    for gaps in product(range(longest + 1), repeat=depth):
        if all(later == 0 or earlier > 0 for earlier, later in pairwise(gaps)):
            index: tuple[Any, ...] = (slice(None), *gaps)
            errors[index] = fitted.gap_errors(np.arange(size), gaps, longest)
    warmup = min(warmup, size)
    # The warm-up is the one state to begin in: its evaluations are neighbours, and there was nothing before them.
    best = np.full(errors.shape[:-1], np.inf)
    best[(warmup - 1, *(int(back < warmup - 1) for back in range(depth)))] = 0.0
    choices: list[NDArray[np.int64]] = []  # the oldest gap that led to each state, by the number of computations
    while True:
        ends = np.full(best.shape, np.inf)
        for last in range(max(size - longest, 0), size):
            ends[last] = best[last] + errors[last][..., size - last - 1]
        if len(choices) >= count - warmup and np.isfinite(ends).any():
            return _backtrack(np.unravel_index(ends.argmin(), ends.shape), choices, size)
        if not np.isfinite(best).any():  # all are computed, and fewer were asked for
            return [True] * size
        following = np.full(best.shape, np.inf)
        chosen = np.zeros(best.shape, dtype=np.int64)
        for gap in range(1, longest + 1):
            # The oldest gap leaves the state: `order + 1` nodes are all that a forecast looks at.
            total = best + errors[..., gap - 1]
            following[gap:, gap] = total.min(axis=-1)[: size - gap]
            chosen[gap:, gap] = total.argmin(axis=-1)[: size - gap]
        best, choices = following, [*choices, chosen]


def _backtrack(state: Sequence[Any], choices: list[NDArray[np.int64]], size: int) -> list[bool]:
    plan = [False] * size
    last, *gaps = (int(index) for index in state)
    for chosen in reversed(choices):
        plan[last] = True
        oldest = int(chosen[(last, *gaps)])
        last, gaps = last - gaps[0], [*gaps[1:], oldest]
    plan[: last + 1] = [True] * (last + 1)  # the warm-up
    return plan
