"""AudioCache, SmoothCache and FORA: curves to decisions, by hand and against the published schedules."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foley.accel.caching.audiocache import audiocache_schedule
from foley.accel.caching.fora import fora_schedule
from foley.accel.caching.smoothcache import smoothcache_schedule


def test_audiocache_is_equation_2_to_the_letter(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "audiocache_schedules.json").read_text())["cases"]
    assert len(cases) == 40
    for case in cases:
        rows = {layer: [bool(bit) for bit in bits] for layer, bits in case["compute"].items()}
        assert audiocache_schedule(case["changes"], case["threshold"]) == rows


def test_audiocache_recomputes_when_the_sum_exceeds_delta() -> None:
    changes = {"a": [9.0, 0.25, 0.25, 0.25, 0.75, 0.125], "b": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]}
    assert audiocache_schedule(changes, delta=0.49) == {
        "a": [True, False, True, True, True, True],  # each sum begins with the change at the one before
        "b": [True, False, False, False, False, False],
    }
    assert audiocache_schedule(changes, delta=0.49, include_refresh=False) == {
        "a": [True, False, True, False, True, False],
        "b": [True, False, False, False, False, False],
    }
    assert audiocache_schedule({"a": [9.0, 0.25, 0.25, 0.25]}, delta=0.5)["a"] == [True, False, False, True]


def test_audiocache_without_the_refresh_sums_only_changes_after_the_last_computation() -> None:
    rows = audiocache_schedule({"a": [0.0, 0.375, 0.375, 0.375, 0.375]}, 0.5, include_refresh=False)
    assert rows["a"] == [True, False, True, False, True]


@pytest.mark.parametrize("curve", [[0.0] * 5, [0.0, 0.1, 0.2, 0.0, 5.0]])
@pytest.mark.parametrize("include_refresh", [True, False])
def test_audiocache_with_delta_zero_computes_always(curve: list[float], include_refresh: bool) -> None:
    assert all(audiocache_schedule({"a": curve}, 0.0, include_refresh)["a"])


@given(curve=st.lists(st.floats(0, 1), min_size=1, max_size=20), delta=st.floats(0, 2))
def test_audiocache_never_reuses_more_by_the_letter_than_without_the_refresh(curve: list[float], delta: float) -> None:
    letter, variant = (audiocache_schedule({"a": curve}, delta, refresh)["a"] for refresh in (True, False))
    assert sum(letter) >= sum(variant)


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
