"""The schedule with the least summed error at a given cost: what the curves allow when the speed-up is chosen first.

The error of a reused output is the sum of the layer's calibrated changes since it was computed, as in AudioCache; the
error of a schedule is the sum over everything that it reuses.
"""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Curves = Mapping[str, Sequence[float]]
Rows = dict[str, list[bool]]


def budget_schedule(
    changes: Curves, layer_macs: Mapping[str, int], total_macs: int, target_speedup: float, method: str = "dynamic"
) -> Rows:
    """Decisions for each layer, true where it computes, whose MACs are at most `1 / target_speedup` of the uncached.

    Args:
        changes: for each layer, its change at each evaluation since the one before; the first value is ignored.
        layer_macs: of one call of each layer.
        total_macs: of one uncached evaluation of the whole denoiser.
        target_speedup: uncached MACs over MACs; 1 computes always.
        method: "dynamic" finds each layer's best schedule for every number of computations by dynamic programming,
            and spends the budget where it removes most error for its MACs; "greedy" starts from computing always, and
            drops whichever computation costs least error for its MACs, one by one.

    Raises ValueError for an unknown method, and for a speed-up out of reach: what is not cacheable always computes, and
    each layer computes once.
    """
    methods = {"dynamic": _dynamic, "greedy": _greedy}
    if method not in methods:
        raise ValueError(f"accel.method must be one of {', '.join(methods)}, got {method!r}")
    num_evaluations = len(next(iter(changes.values())))
    layers_once = sum(layer_macs[layer] for layer in changes)
    budget = num_evaluations * (total_macs / target_speedup - (total_macs - layers_once))
    if target_speedup < 1 or budget < layers_once:
        uncached = num_evaluations * total_macs
        largest = uncached / (uncached - (num_evaluations - 1) * layers_once)
        raise ValueError(f"accel.target_speedup must lie between 1 and {largest:.3g} here, got {target_speedup:g}")
    return methods[method](changes, layer_macs, budget)


def schedule_error(changes: Curves, rows: Mapping[str, Sequence[bool]]) -> float:
    """The summed error of a schedule."""
    return sum(
        float(_interval_errors(changes[layer])[start, end])
        for layer, row in rows.items()
        for start, end in pairwise([*np.flatnonzero(row), len(row)])
    )


def _interval_errors(curve: Sequence[float]) -> NDArray[np.float64]:
    """`[E, E + 1]`: at `[c, e]` the error of computing at c and reusing until e, where the next computation is."""
    position = np.concatenate([[0.0], np.cumsum(np.asarray(curve, dtype=np.float64)[1:])])
    drift = np.maximum(position[None, :] - position[:, None], 0.0)
    drift[np.tril_indices(len(position))] = 0.0
    return np.concatenate([np.zeros((len(position), 1)), np.cumsum(drift, axis=1)], axis=1)


def _dynamic(changes: Curves, layer_macs: Mapping[str, int], budget: float) -> Rows:
    plans = {layer: _best_for_every_count(curve) for layer, curve in changes.items()}
    counts = dict.fromkeys(changes, 1)
    spare = budget - sum(layer_macs[layer] for layer in changes)
    queue: list[tuple[float, str, int]] = []

    def offer(layer: str) -> None:
        if step := _next_step(plans[layer][0], counts[layer], int(spare // layer_macs[layer])):
            gain, count = step
            heappush(queue, (-gain / layer_macs[layer], layer, count))

    for layer in changes:
        offer(layer)
    while queue:
        _, layer, count = heappop(queue)
        cost = (count - counts[layer]) * layer_macs[layer]
        if cost <= spare:
            spare, counts[layer] = spare - cost, count
        offer(layer)
    return {layer: _backtrack(plans[layer][1], count) for layer, count in counts.items()}


def _best_for_every_count(curve: Sequence[float]) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """For n = 1..E computations: the least error, and for each end the last computation that attains it."""
    intervals = _interval_errors(curve)
    size = len(intervals)
    allowed = np.where(np.arange(size)[:, None] < np.arange(size + 1)[None, :], intervals, np.inf)
    best, least, choices = allowed[0], [allowed[0, -1]], [np.zeros(size + 1, dtype=np.int64)]
    for _ in range(size - 1):
        candidates = best[:size, None] + allowed
        choices.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
        least.append(best[-1])
    return np.asarray(least), choices


def _next_step(errors: NDArray[np.float64], count: int, affordable: int) -> tuple[float, int] | None:
    """The larger count that removes most error for each computation, and that gain: a step along the convex hull.

    At most `affordable` computations more; None where none of them removes any error.
    """
    more = np.arange(count + 1, min(count + affordable, len(errors)) + 1)
    gains = (errors[count - 1] - errors[more - 1]) / (more - count)
    if not len(gains) or gains.max() <= 0:
        return None
    return float(gains.max()), int(more[gains.argmax()])


def _backtrack(choices: list[NDArray[np.int64]], count: int) -> list[bool]:
    row, end = [False] * (len(choices[0]) - 1), len(choices[0]) - 1
    for choice in reversed(choices[:count]):
        end = int(choice[end])
        row[end] = True
    return row


def _greedy(changes: Curves, layer_macs: Mapping[str, int], budget: float) -> Rows:
    errors = {layer: _interval_errors(curve) for layer, curve in changes.items()}
    size = len(next(iter(errors.values())))
    rows = {layer: [True] * size for layer in changes}
    spent = float(sum(layer_macs[layer] * size for layer in changes))

    def price(layer: str, evaluation: int) -> tuple[float, str, int]:
        previous, following = _neighbours(rows[layer], evaluation)
        table = errors[layer]
        added = table[previous, following] - table[previous, evaluation] - table[evaluation, following]
        return float(added) / layer_macs[layer], layer, evaluation

    queue = [price(layer, evaluation) for layer in changes for evaluation in range(1, size)]
    heapify(queue)
    while spent > budget:
        offered, layer, evaluation = heappop(queue)
        current = price(layer, evaluation)
        if current[0] > offered:  # a neighbour was dropped since
            heappush(queue, current)
            continue
        rows[layer][evaluation] = False
        spent -= layer_macs[layer]
    return rows


def _neighbours(row: Sequence[bool], evaluation: int) -> tuple[int, int]:
    """The computations before and after; the end of the run where none follows."""
    previous = next(index for index in range(evaluation - 1, -1, -1) if row[index])
    return previous, next((index for index in range(evaluation + 1, len(row)) if row[index]), len(row))
