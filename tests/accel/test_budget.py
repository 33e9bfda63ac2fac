"""The budget policy: within its budget, at least as good as any other schedule, and refusals."""

from itertools import product

import pytest

from foley.accel.caching.audiocache import audiocache_schedule
from foley.accel.caching.budget import budget_schedule, schedule_error
from foley.accel.caching.fora import fora_schedule

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
