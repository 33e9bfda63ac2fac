"""Growth from measurements, and a training on paper, against numbers worked out by hand."""

import pytest

from foley.reporting.scale import DataStage, TrainingPlan, grows_too_fast, growth_exponent

PLAN = TrainingPlan(
    clips=1000,
    clip_frames=500,
    channels=128,
    text_tokens=25,
    text_width=2048,
    parameters=10**6,
    depth=2,
    width=10,
    steps=3600,
    batch_size=80,
    gpus=8,
    peak_flops_per_second=1e12,
)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_is_found_whatever_its_factor(exponent):
    sizes = [1e4, 1e5, 1e6, 2e6]
    assert growth_exponent(sizes, [7e-3 * size**exponent for size in sizes]) == pytest.approx(exponent)


def test_growth_needs_two_sizes_and_costs():
    for sizes, costs in (([10, 10], [1.0, 2.0]), ([10, 100], [0.0, 1.0])):
        with pytest.raises(ValueError, match="growth needs costs above 0 at two sizes"):
            growth_exponent(sizes, costs)
    assert not grows_too_fast(1.1, 100.0)


def test_bytes_are_values_times_their_size():
    assert PLAN.clip_bytes(2) == 2 * 500 * 128 * 2 == 2 * PLAN.clip_bytes(1)
    assert PLAN.caption_bytes == 102_400
    assert PLAN.checkpoint_bytes == 16 * 10**6
    assert PLAN.epochs == 3600 * 80 / 1000


def test_hours_and_rates_follow_from_the_share_of_the_peak():
    flops = (6 * 10**6 + 12 * 2 * 10 * 500) * 500 * 80
    assert PLAN.step_flops == flops
    seconds = flops / (8 * 1e12 * 0.5)
    assert PLAN.step_seconds(0.5) == pytest.approx(seconds)
    assert PLAN.hours(0.5) == pytest.approx(seconds)  # 3600 steps
    assert PLAN.clips_per_second(0.5) == pytest.approx(10 / seconds)
    assert PLAN.read_bytes_per_second(0.5, 1) == pytest.approx(10 / seconds * (128_000 + 102_400))
    assert PLAN.step_seconds(0.25) == pytest.approx(2 * seconds)


def test_a_stage_of_data_takes_as_long_as_the_slower_of_its_two_sides():
    stage = DataStage("latents", "encode", flops=4e11, processor_seconds=0.12, clip_bytes=256_000)
    assert stage.limit(cores=12, flops_per_second=1e13) == "GPUs"
    assert stage.hours(900_000, 8, 12, 1e13) == pytest.approx(900_000 * 0.04 / 8 / 3600)
    assert stage.limit(cores=2, flops_per_second=1e13) == "processors"
    assert stage.hours(900_000, 8, 2, 1e13) == pytest.approx(900_000 * 0.06 / 8 / 3600)
