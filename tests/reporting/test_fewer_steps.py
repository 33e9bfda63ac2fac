"""What must be beaten: the error of fewer steps, on straight lines between their counts."""

import pytest

from foley.reporting.fewer_steps import FEWER_STEPS, against_fewer_steps, error_of_fewer_steps, prediction_aims


def row(policy, speedup, error, **more):
    return {"policy": policy, "mac_speedup": speedup, "latent_error": error, **more}


STEPS = [row(FEWER_STEPS, *pair) for pair in ((4.0, 0.16), (1.0, 0.01), (2.0, 0.04), (1.0, 0.0))]


@pytest.mark.parametrize(
    ("speedup", "error"), [(1.0, 0.01), (1.5, 0.02), (2.0, 0.04), (3.0, 0.08), (4.0, 0.16), (0.9, None), (4.1, None)]
)
def test_the_logarithm_of_the_error_runs_straight_between_step_counts(speedup, error):
    assert error_of_fewer_steps(STEPS, speedup) == (error if error is None else pytest.approx(error))


def test_rows_are_marked_and_the_yardstick_is_not():
    rows = against_fewer_steps([*STEPS, row("fora", 3.0, 0.02), row("audiocache", 1.5, 0.03), row("far", 9.0, 0.5)])
    assert all("beats_fewer_steps" not in marked for marked in rows[:4])
    assert [marked["beats_fewer_steps"] for marked in rows[4:]] == ["yes", "no", None]
    assert [marked["error_ratio"] for marked in rows[4:6]] == pytest.approx([0.25, 1.5])


def test_results_without_fewer_steps_or_without_costs_are_left_as_they_are():
    assert against_fewer_steps([row("fora", 3.0, 0.02)])[0]["beats_fewer_steps"] is None
    assert against_fewer_steps([{"policy": "fora", "mac_speedup": None, "latent_error": 0.1}]) == [
        {"policy": "fora", "mac_speedup": None, "latent_error": 0.1}
    ]
    assert error_of_fewer_steps([], 2.0) is None


def test_the_median_clip_is_compared_with_the_median_clip():
    fora = [row("fora", speedup, 0.2, latent_error_median=0.04, reuse="taylor") for speedup in (2.0, 4.0)]
    steps = [{**known, "latent_error_median": 0.02} for known in STEPS]
    rows = against_fewer_steps([*steps, *fora, row("prediction", 3.0, 0.16, latent_error_median=0.01)])
    (aim,) = prediction_aims(rows)
    assert (aim["error_ratio"], aim["error_ratio_median"]) == pytest.approx((2.0, 0.5))
    assert (aim["over_fora"], aim["over_fora_median"]) == pytest.approx((0.8, 0.25))
    assert aim["over_fora_timed"] is None
    assert against_fewer_steps([*STEPS, row("fora", 3.0, 0.02)])[-1]["error_ratio_median"] is None


def test_what_takes_time_but_no_macs_is_compared_in_time():
    fora = [
        row("fora", 4.0, error, processor_speedup=speedup, reuse="taylor")
        for speedup, error in ((2.0, 0.01), (3.0, 0.04))
    ]
    (aim,) = prediction_aims([*fora, row("prediction", 2.9, 0.01, processor_speedup=2.5)])
    assert (aim["over_fora"], aim["over_fora_timed"]) == (None, pytest.approx(0.5))
