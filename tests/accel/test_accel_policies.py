"""AudioCache, SmoothCache and FORA: curves to decisions, by hand and against the published schedules."""

import json
from pathlib import Path

import pytest

from foley.accel.caching.audiocache import audiocache_schedule
from foley.accel.caching.fora import fora_schedule
from foley.accel.caching.smoothcache import smoothcache_schedule


def test_audiocache_recomputes_when_the_sum_reaches_delta() -> None:
    changes = {"a": [9.0, 0.25, 0.25, 0.25, 0.75, 0.125], "b": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]}
    assert audiocache_schedule(changes, delta=0.5) == {
        "a": [True, False, True, False, True, False],
        "b": [True, False, False, False, False, False],
    }


def test_audiocache_sums_only_changes_after_the_last_computation() -> None:
    assert audiocache_schedule({"a": [0.0, 0.375, 0.375, 0.375, 0.375]}, 0.5)["a"] == [True, False, True, False, True]


@pytest.mark.parametrize("curve", [[0.0] * 5, [0.0, 0.1, 0.2, 0.0, 5.0]])
def test_audiocache_with_delta_zero_computes_always(curve: list[float]) -> None:
    assert all(audiocache_schedule({"a": curve}, delta=0.0)["a"])


def test_smoothcache_matches_every_published_schedule(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "smoothcache_schedules.json").read_text())
    errors = golden["errors_by_layer_then_distance_then_step"]
    for case in golden["cases"]:
        schedule = smoothcache_schedule(errors, case["alpha"], golden["steps"])
        assert schedule == {kind: [bool(bit) for bit in bits] for kind, bits in case["schedule"].items()}


def test_smoothcache_takes_the_largest_passing_lookahead_and_computes_the_ends() -> None:
    errors = {"0.ff": [[0.1, 0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.1, 0.9], [0.9, 0.9, 0.9]]}
    assert smoothcache_schedule(errors, 0.5, 6)["ff"] == [True, False, True, False, False, True]


def test_smoothcache_averages_over_the_blocks_of_a_kind() -> None:
    curves = [[0.0, 0.0]], [[0.6, 0.9]]
    together = smoothcache_schedule(dict(zip(("0.k", "1.k"), curves, strict=True)), 0.4, 3)
    apart = smoothcache_schedule(dict(zip(("0.k", "0.l"), curves, strict=True)), 0.4, 3)
    assert together == {"k": [True, False, True]}
    assert apart == {"k": [True, False, True], "l": [True, True, True]}


def test_fora_computes_every_nth_step() -> None:
    assert fora_schedule(5, 2) == [True, False, True, False, True]
    assert all(fora_schedule(5, 1))


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got -0\.1"):
        audiocache_schedule({}, -0.1)
    with pytest.raises(ValueError, match="got -1"):
        smoothcache_schedule({}, -1, 3)
    with pytest.raises(ValueError, match="got 0"):
        fora_schedule(5, 0)
