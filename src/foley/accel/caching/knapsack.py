"""A multiple-choice knapsack, solved exactly: how often each layer computes, so that the summed error is least.

Layers of equal multiply-accumulates (MACs) share their computations freely: the least error of n computations of a
group is the min-plus convolution of those of its layers. Groups of different MACs are merged one by one into the sums
of MACs and error that no other sum beats in both (Pareto). Of these, whatever cannot lead to the best is left out: its
error and a lower bound of the rest's, by the convex hulls of their curves, exceed what a greedy choice attains.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_LARGEST_BLOCK = 1_000_000  # sums that are looked at at once
_ROUNDING = 1e-12


def least_error(errors: Mapping[str, Array], macs: Mapping[str, int], budget: float) -> dict[str, int]:
    """How often each layer computes, at `budget` MACs at most.

    Args:
        errors: at `[n - 1]` the least error of a layer that computes n times; infinite where it cannot.
        macs: of one call of each layer.
        budget: of all their calls; raises ValueError where no choice meets it.

    >>> errors = {"a": np.array([9.0, 1.0, 0.0]), "b": np.array([5.0, 4.0, 0.0])}
    >>> least_error(errors, {"a": 3, "b": 2}, budget=10)
    {'a': 2, 'b': 2}
    """
    by_macs: dict[int, list[str]] = {}
    for layer in errors:
        by_macs.setdefault(macs[layer], []).append(layer)
    groups = [_Group([errors[layer] for layer in layers], unit) for unit, layers in by_macs.items()]
    chosen = _choose([group.points for group in groups], budget * (1 + _ROUNDING))
    counts = {
        layer: count
        for layers, group, point in zip(by_macs.values(), groups, chosen, strict=True)
        for layer, count in zip(layers, group.counts(point), strict=True)
    }
    return {layer: counts[layer] for layer in errors}


class _Group:
    """Layers of equal MACs; `points` are sums of MACs, ascending, and least errors, strictly descending."""

    def __init__(self, errors: Sequence[Array], unit: int) -> None:
        self._choices: list[NDArray[np.int64]] = []  # of each layer but the first, for every sum of counts
        combined = errors[0]
        for own in errors[1:]:
            combined, choice = min_plus(combined, own)
            self._choices.append(choice)
        # Another computation is worth its MACs only where it removes error.
        before = np.minimum.accumulate(np.concatenate([[np.inf], combined[:-1]]))
        self._kept = np.flatnonzero(combined < before)
        self.points: tuple[Array, Array] = ((len(errors) + self._kept).astype(np.float64) * unit, combined[self._kept])

    def counts(self, point: int) -> list[int]:
        """How often each layer computes at that point."""
        rest, found = int(self._kept[point]), []
        for choice in reversed(self._choices):
            found.append(int(choice[rest]))
            rest -= found[-1]
        return [count + 1 for count in (rest, *reversed(found))]


def min_plus(left: Array, right: Array) -> tuple[Array, NDArray[np.int64]]:
    """`[n]`: the least `left[n - k] + right[k]`, and the k that attains it.

    >>> min_plus(np.array([3.0, 0.0]), np.array([5.0, 1.0]))
    (array([8., 4., 1.]), array([0, 1, 1]))
    """
    least = np.full(len(left) + len(right) - 1, np.inf)
    choice = np.zeros(len(least), dtype=np.int64)
    for k, value in enumerate(right):
        span = slice(k, k + len(left))
        better = left + value < least[span]
        least[span][better] = (left + value)[better]  # slices are views
        choice[span][better] = k
    return least, choice


def _choose(groups: Sequence[tuple[Array, Array]], budget: float) -> list[int]:
    """The point of each group, such that MACs are within the budget and the error is least."""
    hulls = [_hull(*points) for points in groups]
    bounds = [_bound(hulls[first:]) for first in range(len(groups) + 1)]  # of the groups from each one on
    if bounds[0][0][0] > budget:
        raise ValueError(f"no choice takes at most {budget:g} multiply-accumulates: the least is {bounds[0][0][0]:g}")
    most = _attained(hulls, budget) + _ROUNDING * bounds[0][1][0]  # of the size of what is added and taken away
    costs, errors, trace = np.zeros(1), np.zeros(1), []
    for points, bound in zip(groups, bounds[1:], strict=True):
        costs, errors, earlier, own = _merged((costs, errors), points, bound, budget, most)
        trace.append((earlier, own))
    best, chosen = int(errors.argmin()), []
    for earlier, own in reversed(trace):
        chosen.append(int(own[best]))
        best = int(earlier[best])
    return chosen[::-1]


def _merged(
    front: tuple[Array, Array], points: tuple[Array, Array], bound: tuple[Array, Array], budget: float, most: float
) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.int64]]:
    """The sums of a front and a group that may lead to the best, and the indices of their parts."""
    rows = max(1, _LARGEST_BLOCK // len(points[0]))
    found = []
    for first in range(0, len(front[0]), rows):
        costs = front[0][first : first + rows, None] + points[0]
        errors = front[1][first : first + rows, None] + points[1]
        left = budget - costs  # for the groups to come
        kept = (left >= bound[0][0]) & (errors + np.interp(left, *bound) <= most)
        earlier, own = np.nonzero(kept)
        found.append((costs[kept], errors[kept], earlier + first, own))
    costs, errors, earlier, own = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((errors, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]]))
    order = order[errors[order] < before]  # no cheaper sum has as little error
    return costs[order], errors[order], earlier[order], own[order]


def _hull(costs: Array, errors: Array) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points whose costs ascend and errors descend."""
    corners: list[tuple[float, float]] = []
    for x, y in zip(costs.tolist(), errors.tolist(), strict=True):
        while len(corners) > 1 and _turns_down(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return corners


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])  # b is on or above the line from a to c


def _steps(hulls: Sequence[list[tuple[float, float]]]) -> Iterator[tuple[int, float, float]]:
    """Group, cost and change of error of all sides of the hulls, the one that removes most for its cost first."""
    sides = [
        (group, after[0] - before[0], after[1] - before[1])
        for group, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    return iter(sorted(sides, key=lambda side: side[2] / side[1]))


def _bound(hulls: Sequence[list[tuple[float, float]]]) -> tuple[Array, Array]:
    """Budgets, and at each the least error were parts of computations to be had: no choice has less."""
    sides = list(_steps(hulls))
    start = sum(hull[0][0] for hull in hulls), sum(hull[0][1] for hull in hulls)
    costs, errors = [start[0], *(side[1] for side in sides)], [start[1], *(side[2] for side in sides)]
    return np.cumsum(costs), np.cumsum(errors)


def _attained(hulls: Sequence[list[tuple[float, float]]], budget: float) -> float:
    """The error of one choice within the budget: whole sides of the hulls, while they can be paid."""
    cost, error = sum(hull[0][0] for hull in hulls), sum(hull[0][1] for hull in hulls)
    closed: set[int] = set()
    for group, more, change in _steps(hulls):
        if group in closed or cost + more > budget:
            closed.add(group)  # its later sides begin where this one ends
            continue
        cost, error = cost + more, error + change
    return error
