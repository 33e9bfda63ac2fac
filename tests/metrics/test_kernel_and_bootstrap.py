"""Kernel distances and confidence intervals, against sums written out and against what is known of them."""

import pytest
import torch

from foley.metrics.distances import (
    GaussianKernel,
    GaussianRoot,
    dealt_parts,
    extrapolated_distance,
    frechet_slopes,
    kernel_audio_distance,
    median_bandwidth,
    pairs_by_number,
    squared_discrepancy,
)
from foley.metrics.features import ClipFeatures
from foley.metrics.pairing import pair_clips
from foley.metrics.scores import (
    Comparison,
    _extrapolated,
    draw_counts,
    estimate,
    frechet,
    frechet_infinity,
    inception,
    kad,
    kl,
)


def linear_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y.T / x.shape[1] + 1


def normal(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double() + shift


@pytest.mark.parametrize("kernel", [GaussianKernel(0.7), linear_kernel])
def test_discrepancy_equals_the_sum_over_pairs(kernel) -> None:
    x, y = normal(5, 0), normal(4, 1)
    value = {(i, j): float(kernel(a[None], b[None])) for i, a in enumerate([*x, *y]) for j, b in enumerate([*x, *y])}
    within_x = sum(value[i, j] for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(value[i, j] for i in range(5, 9) for j in range(5, 9) if i != j) / 12
    across = sum(value[i, j] for i in range(5) for j in range(5, 9)) / 20
    expected = within_x + within_y - 2 * across
    assert float(squared_discrepancy(x, y, kernel)) == pytest.approx(expected, abs=1e-12)


def test_discrepancy_of_means_is_known() -> None:
    # With a linear kernel the discrepancy is |mean difference|^2 / D without the pairs of a vector with itself.
    x, y = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0], [5.0]]).double()
    assert float(squared_discrepancy(x, y, linear_kernel)) == pytest.approx(0 + 15 - 2 * 4)


def test_blocks_do_not_change_the_value(monkeypatch) -> None:
    x, y = normal(50, 0), normal(40, 1)
    whole = kernel_audio_distance(x, y)
    monkeypatch.setattr("foley.metrics.distances._BLOCK_ROWS", 7)
    torch.testing.assert_close(kernel_audio_distance(x, y), whole)


def test_unbiased_at_any_size_and_grows_with_a_shift() -> None:
    values = torch.cat([kernel_audio_distance(normal(12, 2 * seed), normal(12, 2 * seed + 1)) for seed in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    distances = [float(kernel_audio_distance(normal(200, 0), normal(200, 1, shift))) for shift in (0.2, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_repeats_of_a_clip_make_no_pair() -> None:
    x, y = normal(6, 0), normal(6, 1)
    counts = torch.tensor([[2.0, 2, 2, 2, 2, 2]]).double()
    kernel = GaussianKernel(1.0)
    torch.testing.assert_close(squared_discrepancy(x, y, kernel, (counts, counts)), squared_discrepancy(x, y, kernel))


def test_bandwidth_is_the_median_distance_of_the_reference() -> None:
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])) == 2
    with pytest.raises(ValueError, match="they are alike"):
        median_bandwidth(torch.ones(4, 2))
    with pytest.raises(ValueError, match="2 clips in each set, got 5 and 1"):
        squared_discrepancy(normal(5, 0), normal(1, 1), GaussianKernel(1.0))


@pytest.mark.parametrize("n", [2, 3, 40])
def test_pairs_have_the_numbers_of_their_list(n: int) -> None:
    assert torch.equal(pairs_by_number(torch.arange(n * (n - 1) // 2), n), torch.triu_indices(n, n, offset=1))


def test_pairs_of_two_million_are_found_without_a_list() -> None:
    n = 2_000_000
    numbers = torch.tensor([0, n - 2, n - 1, n * (n - 1) // 2 - 1])
    assert pairs_by_number(numbers, n).T.tolist() == [[0, 1], [0, n - 1], [1, 2], [n - 2, n - 1]]
    assert median_bandwidth(torch.arange(100_000.0)[:, None]) == pytest.approx(100_000 * (1 - 0.5**0.5), rel=0.01)


def test_a_large_set_pairs_within_parts(monkeypatch) -> None:
    monkeypatch.setattr("foley.metrics.distances.MOST_TOGETHER", 50)
    met = []

    def counting(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        met.append(len(x) * len(y))
        return linear_kernel(x, y)

    for n in (1000, 2000, 4000):
        met.append(0)
        squared_discrepancy(normal(n, 0), normal(60, 1), counting)
        # Within 20, 40 or 80 parts of 50; within the 2 of 30; of each of the former and one of the latter.
        assert sum(met) == n * 50 + 60 * 30 + n * 30
        met.clear()
    drawn = [float(kernel_audio_distance(normal(120, 2 * seed), normal(70, 2 * seed + 1))) for seed in range(100)]
    values = torch.tensor(drawn)
    assert abs(values.mean()) < 3 * values.std() / 100**0.5


def test_parts_count_their_pairs_as_repetitions(monkeypatch) -> None:
    monkeypatch.setattr("foley.metrics.distances.MOST_TOGETHER", 4)
    x, y, kernel = normal(8, 0), normal(5, 1), GaussianKernel(1.0)
    counts = torch.tensor([[2.0, 2, 2, 2, 2, 2, 2, 2]]).double(), torch.tensor([[3.0, 3, 3, 3, 3]]).double()
    torch.testing.assert_close(squared_discrepancy(x, y, kernel, counts), squared_discrepancy(x, y, kernel))


@pytest.mark.parametrize(("n", "m"), [(30, 40), (4, 3), (40, 3)])  # 3 features: of singular covariances too
def test_slopes_are_the_derivatives_of_the_distance_by_counts(n: int, m: int) -> None:
    x, y = normal(n, 0), 1.5 * normal(m, 1, 0.4)
    known, fitted = GaussianRoot.fit(x), GaussianRoot.fit(y)
    value, of_x, of_y = frechet_slopes(known, fitted)
    assert value == pytest.approx(known.distance(fitted), abs=1e-9)

    def moved(first: float, second: float) -> float:
        counts = [torch.ones(count).double() for count in (n, m)]
        counts[0][1], counts[1][2] = 1 + first, 1 + second
        return GaussianRoot.fit(x, counts[0]).distance(GaussianRoot.fit(y, counts[1]))

    step = 1e-5
    assert float(of_x.of(x)[1]) == pytest.approx((moved(step, 0) - moved(-step, 0)) / (2 * step), abs=1e-6)
    assert float(of_y.of(y)[2]) == pytest.approx((moved(0, step) - moved(0, -step)) / (2 * step), abs=1e-6)


def test_a_linear_interval_is_nearer_to_the_scatter_of_a_distance_than_one_of_refits() -> None:
    pairs = [(normal(60, 2 * seed), 1.3 * normal(60, 2 * seed + 1, 0.5)) for seed in range(100)]
    truth = torch.tensor([GaussianRoot.fit(x).distance(GaussianRoot.fit(y)) for x, y in pairs]).std()
    reference, generated = draw_counts(60, 40, "reference"), draw_counts(60, 40, "generated")
    linear, refitted = [], []
    for x, y in pairs[:10]:
        _, of_x, of_y = frechet_slopes(GaussianRoot.fit(x), GaussianRoot.fit(y))
        drawn = (reference - 1) @ of_x.of(x) + (generated - 1) @ of_y.of(y)
        linear.append(drawn[1:].std())
        refits = [
            GaussianRoot.fit(x, a).distance(GaussianRoot.fit(y, b)) for a, b in zip(reference, generated, strict=True)
        ]
        refitted.append(torch.tensor(refits[1:]).std())
    errors = [abs(torch.stack(found).mean() - truth) for found in (linear, refitted)]
    assert errors[0] < errors[1]
    assert errors[0] < 0.15 * truth


def test_weights_of_the_parts_are_those_of_a_line_read_at_zero() -> None:
    parts = list(dealt_parts(torch.arange(40)))
    assert [(weight, len(part)) for weight, part in parts] == [
        (1.0, 40),
        *[(0.25, 20)] * 2,
        *[(-0.125, 10)] * 4,
    ]  # 1, 1/2, 0 and -1/2 of the means over the wholes, halves, thirds and quarters
    for size in (40, 20, 10):
        met = torch.cat([part for _, part in parts if len(part) == size])
        assert met.sort().values.tolist() == list(range(40))


@pytest.mark.parametrize("windows", [1, 3])
def test_an_extrapolation_and_its_draws_are_those_of_refitted_parts(windows: int) -> None:
    n, step = 24, 1e-5
    clips = [
        ClipFeatures(
            *([str(i) for i in range(n)], [None] * n, [None] * n),
            features=normal(n * windows, seed, shift),
            windows=torch.full((n,), windows),
            logits=torch.zeros(n, 0),
            peaks=torch.ones(n),
            recordings=[str(i) for i in range(n)],
            seconds=torch.ones(n),
        )
        for seed, shift in ((0, 0.0), (1, 0.7))
    ]
    sets = Comparison(clips[1], clips[0], None, None, 1, resamples=3)
    score = frechet_infinity(sets)["frechet_distance_infinity"]

    def refitted(reference: torch.Tensor, generated: torch.Tensor) -> float:
        known = GaussianRoot.fit(clips[0].features, reference.repeat_interleave(windows))

        def distance(part: torch.Tensor) -> float:
            own = (part * generated).repeat_interleave(windows)
            return known.distance(GaussianRoot.fit(clips[1].features, own))

        return extrapolated_distance(distance, torch.ones(n).double())

    ones = torch.ones(n).double()
    assert score.value == pytest.approx(refitted(ones, ones), rel=1e-9)
    for side in (0, 1):
        moved = [ones.clone(), ones.clone()]
        moved[side][5] += step
        by_slope = torch.zeros(2, n).double()
        by_slope[side, 5] = step
        object.__setattr__(sets, "counts", (1 + by_slope[:1], 1 + by_slope[1:]))
        linear = float(sets.linear(*_extrapolated(sets))) - score.value
        assert linear / step == pytest.approx((refitted(*moved) - score.value) / step, rel=1e-3)


@pytest.mark.slow
def test_scores_of_a_hundred_thousand_clips(monkeypatch) -> None:
    monkeypatch.setattr("foley.metrics.distances.MOST_TOGETHER", 200)
    n = 100_000
    clips = [
        ClipFeatures(
            *([str(i) for i in range(n)], [None] * n, [None] * n),
            features=normal(n, seed).float(),
            windows=torch.ones(n, dtype=torch.long),
            logits=normal(n, seed),
            peaks=torch.ones(n),
            recordings=[str(i) for i in range(n)],
            seconds=torch.ones(n),
        )
        for seed in (0, 1)
    ]
    reference, pairs = pair_clips(clips[1], clips[0], "required")
    sets = Comparison(clips[1], reference, pairs, None, 10, resamples=3)
    found = frechet(sets) | frechet_infinity(sets) | kad(sets) | kl(sets) | inception(sets)
    assert found["frechet_distance"].value < 1e-3
    assert abs(found["kernel_audio_distance"].value) < 0.1
    assert all(score.low <= score.value <= score.high for score in found.values())


def test_draws_are_repeatable_counts() -> None:
    counts = draw_counts(30, 50, "generated")
    assert counts.shape == (51, 30)
    assert torch.equal(counts[0], torch.ones(30).double())
    assert (counts.sum(dim=1) == 30).all()
    assert torch.equal(counts, draw_counts(30, 50, "generated"))
    assert not torch.equal(counts, draw_counts(30, 50, "reference"))


def test_interval_of_a_mean_is_that_of_theory() -> None:
    values = normal(400, 0)[:, 0]
    counts = draw_counts(400, 2000, "generated")
    found = estimate(counts @ values / 400, "400")
    margin = float(1.96 * values.std() / 400**0.5)
    assert found.value == pytest.approx(float(values.mean()), abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    assert (found.low, found.high) == pytest.approx((found.value - margin, found.value + margin), abs=0.1 * margin)


def test_bias_of_the_draws_is_taken_out_and_a_floor_holds() -> None:
    drawn = torch.cat([torch.tensor([1.0]), torch.linspace(4, 6, 101)]).double()
    found = estimate(drawn, "9", floor=0.2)
    assert (found.low, found.high) == pytest.approx((0.2, 1.95))
    assert estimate(drawn[:1], "9").low is None


def test_draws_of_one_clip_again_and_again_leave_the_interval_finite() -> None:
    nan = torch.tensor([float("nan")]).double()
    drawn = torch.cat([torch.tensor([5.0]), torch.linspace(4, 6, 101)]).double()
    assert estimate(torch.cat([drawn, nan]), "4") == estimate(drawn, "4")
    assert estimate(torch.cat([drawn[:1], nan]), "4").low is None
