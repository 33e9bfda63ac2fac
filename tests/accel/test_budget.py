"""The budget policy: within its budget, at least as good as any other schedule, and refusals."""

from itertools import product

import numpy as np
import pytest

from foley.accel.caching.audiocache import audiocache_schedule
from foley.accel.caching.budget import budget_schedule, schedule_error
from foley.accel.caching.fora import fora_schedule
from foley.accel.caching.knapsack import least_error
from foley.accel.caching.schedule import Constraints

CHANGES = {"a.ff": [0.0, 0.5, 0.1, 0.1, 0.9, 0.1], "b.ff": [0.0, 0.2, 0.2, 0.2, 0.2, 0.2]}
MACS, TOTAL = {"a.ff": 3, "b.ff": 1}, 5


def macs_of(rows) -> int:
    evaluations = len(next(iter(rows.values())))
    return evaluations * (TOTAL - sum(MACS.values())) + sum(MACS[layer] * sum(row) for layer, row in rows.items())


def test_the_error_of_a_schedule_is_what_changed_since_each_output_was_computed() -> None:
    rows = {"a.ff": [True, False, False, True, True, False]}
    assert schedule_error(CHANGES, rows) == pytest.approx(0.5 + 0.6 + 0.1)
    assert schedule_error(CHANGES, {"a.ff": [True] * 6}) == 0


@pytest.mark.parametrize("method", ["dynamic", "greedy"])
@pytest.mark.parametrize("speedup", [1.0, 1.3, 2.0, 2.9])
def test_the_budget_is_kept(method: str, speedup: float) -> None:
    rows = budget_schedule(CHANGES, MACS, TOTAL, speedup, method)
    assert all(row[0] for row in rows.values())
    assert macs_of(rows) <= 6 * TOTAL / speedup + 1e-9
    assert speedup > 1 or all(all(row) for row in rows.values())


@pytest.mark.parametrize("method", ["dynamic", "greedy"])
def test_of_one_layer_the_schedule_is_the_best_there_is(method: str) -> None:
    """With a single layer the dynamic programme is exact; compared with all 32 schedules of each cost."""
    changes = {"a.ff": CHANGES["a.ff"]}
    for computations in range(1, 7):
        every = ([True, *bits] for bits in product((True, False), repeat=5) if 1 + sum(bits) == computations)
        best = min(schedule_error(changes, {"a.ff": row}) for row in every)
        rows = budget_schedule(changes, {"a.ff": 3}, 3, 6 / computations, method)
        assert sum(rows["a.ff"]) == computations
        error = schedule_error(changes, rows)
        assert error == pytest.approx(best) if method == "dynamic" else error >= best - 1e-9


def test_at_equal_cost_no_other_policy_has_less_error() -> None:
    for rows in (
        audiocache_schedule(CHANGES, 0.4),
        audiocache_schedule(CHANGES, 0.65),
        dict.fromkeys(CHANGES, fora_schedule(6, 2)),
        dict.fromkeys(CHANGES, fora_schedule(6, 3)),
    ):
        budget = budget_schedule(CHANGES, MACS, TOTAL, 6 * TOTAL / macs_of(rows))
        assert schedule_error(CHANGES, budget) <= schedule_error(CHANGES, rows) + 1e-9


@pytest.mark.parametrize("speedup", [0.9, 3.1])
def test_a_speedup_out_of_reach_is_refused(speedup: float) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 3 here, got {speedup}"):
        budget_schedule(CHANGES, MACS, TOTAL, speedup)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'best'"):
        budget_schedule(CHANGES, MACS, TOTAL, 2.0, "best")


def _every_row(size: int) -> list[list[bool]]:
    return [[True, *bits] for bits in product((True, False), repeat=size - 1)]


def _error(curve: list[float], row: list[bool]) -> float:
    total = drift = 0.0
    for change, computes in zip(curve, row, strict=True):
        drift = 0.0 if computes else drift + change
        total += drift
    return total


def _allowed(row: list[bool], most_reuses: int, cooldown: int) -> bool:
    runs = "".join("x" if computes else "." for computes in row).split("x")
    return max(map(len, runs)) <= most_reuses and all(row[len(row) - cooldown :])


def _least_of_all(changes, macs, budget: float, most_reuses: int, cooldown: int) -> float:
    """The error of the best of all schedules within the budget, each of which is looked at."""
    costs, errors = np.zeros(1), np.zeros(1)
    for layer, curve in changes.items():
        rows = [row for row in _every_row(len(curve)) if _allowed(row, most_reuses, cooldown)]
        cost = np.array([macs[layer] * sum(row) for row in rows])
        error = np.array([_error(curve, row) for row in rows])
        costs, errors = (costs[:, None] + cost).ravel(), (errors[:, None] + error).ravel()
    return float(errors[costs <= budget * (1 + 1e-9)].min())


def test_of_many_toys_with_unequal_macs_every_schedule_is_the_best_there_is() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        layers, size = [f"{index}.ff" for index in range(generator.integers(2, 4))], int(generator.integers(3, 6))
        changes = {layer: (generator.random(size) ** generator.integers(1, 5)).tolist() for layer in layers}
        macs = {layer: int(generator.integers(1, 12)) for layer in layers}
        total = sum(macs.values()) + int(generator.integers(0, 5))
        constraints = Constraints(
            max_reuses=None if generator.random() < 0.7 else 2, cooldown=int(generator.integers(0, 2))
        )
        fewest = sum(fora_schedule(size, size, constraints))
        largest = size * total / (size * total - (size - fewest) * sum(macs.values()))
        speedup = float(1 + generator.random() * (largest - 1))
        rows = budget_schedule(changes, macs, total, speedup, constraints=constraints)
        budget = size * (total / speedup - (total - sum(macs.values())))
        assert sum(macs[layer] * sum(row) for layer, row in rows.items()) <= budget * (1 + 1e-9)
        limits = size if constraints.max_reuses is None else constraints.max_reuses, constraints.cooldown
        assert all(_allowed(row, *limits) for row in rows.values())
        assert schedule_error(changes, rows) <= _least_of_all(changes, macs, budget, *limits) + 1e-12


def test_many_layers_of_many_costs_are_solved_exactly() -> None:
    """By dynamic programming over every number of multiply-accumulates, one layer after the other."""
    generator = np.random.default_rng(1)
    errors = {f"{i}.ff": np.sort(generator.random(12))[::-1].copy() for i in range(9)}
    macs = {layer: int(generator.integers(1, 30)) for layer in errors}
    budget = 6 * sum(macs.values())
    least = np.zeros(budget + 1)  # of the layers so far, at every budget
    for layer, own in errors.items():
        shifted = [np.concatenate([np.full(n * macs[layer], np.inf), least])[: budget + 1] for n in range(1, 13)]
        least = np.min([row + own[n] for n, row in enumerate(shifted)], axis=0)
    counts = least_error(errors, macs, budget)
    assert sum(macs[layer] * count for layer, count in counts.items()) <= budget
    assert sum(errors[layer][count - 1] for layer, count in counts.items()) == pytest.approx(least[budget])
    with pytest.raises(ValueError, match="no choice takes at most 1"):
        least_error(errors, macs, 1)


def test_a_speedup_that_constraints_put_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 2 here"):
        budget_schedule({"a.ff": [0.5] * 6}, {"a.ff": 3}, 3, 3.0, constraints=Constraints(max_reuses=1))
