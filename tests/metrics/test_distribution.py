"""Closed forms and identities of the distances between sets."""

import logging
import math

import pytest
import torch

from foley.metrics.distribution import (
    GaussianStatistics,
    frechet_distance,
    gaussian_frechet_distance,
    inception_score,
    kl_marginal,
    kl_sigmoid,
    kl_softmax,
    label_accuracy,
)

FEATURES = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def statistics_of(features: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(features.shape[1]).update(features)


def test_frechet_of_isotropic_gaussians() -> None:
    zero, identity = torch.zeros(8), torch.eye(8)
    assert gaussian_frechet_distance(zero, identity, torch.ones(8), 4 * identity) == pytest.approx(16, abs=1e-6)
    assert gaussian_frechet_distance(zero, identity, zero, identity) == pytest.approx(0, abs=1e-6)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    # tr sqrt(S1 S2) = sqrt(tr + 2 sqrt(det)) = sqrt(8 + 2 * 3), so the distance is 5 + 4 + 4 - 2 sqrt(14).
    mean, covariance = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    other = torch.diag(torch.tensor([1.0, 3.0]))
    distance = gaussian_frechet_distance(mean, covariance, torch.zeros(2), other)
    assert distance == pytest.approx(5.516685226452, abs=1e-9)
    assert distance == pytest.approx(13 - 2 * math.sqrt(14), abs=1e-9)
    assert gaussian_frechet_distance(torch.zeros(2), other, mean, covariance) == pytest.approx(distance, abs=1e-9)


def test_frechet_of_singular_covariances_is_finite() -> None:
    # N(0, diag(1, 0)) against N(0, diag(0, 1)): nothing in common, so the traces add.
    first, second = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    assert gaussian_frechet_distance(torch.zeros(2), first, torch.zeros(2), second) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("sizes", [[400], [1, 399], [100, 0, 7, 293]])
def test_streaming_statistics_equal_those_of_the_whole_set(sizes: list[int]) -> None:
    statistics = GaussianStatistics(6)
    for part in FEATURES.split(sizes):
        statistics.update(part)
    assert statistics.count == 400
    torch.testing.assert_close(statistics.mean, FEATURES.double().mean(0))
    torch.testing.assert_close(statistics.covariance, FEATURES.double().T.cov())


def test_streaming_statistics_stay_exact_far_from_zero() -> None:
    features = FEATURES.double() + 1e6
    statistics = GaussianStatistics(6)
    for part in features.split(32):
        statistics.update(part)
    torch.testing.assert_close(statistics.covariance, features.T.cov())


def test_frechet_of_a_set_with_itself_is_zero_and_a_shift_adds_its_square() -> None:
    own, shifted = statistics_of(FEATURES), statistics_of(FEATURES + 2)
    assert frechet_distance(own, own) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(own, shifted) == pytest.approx(6 * 4, abs=1e-4)


def test_small_sets_warn_and_single_clips_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        frechet_distance(statistics_of(FEATURES[:6]), statistics_of(FEATURES))
    assert "n = 6 <= 6" in caplog.text
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        frechet_distance(statistics_of(FEATURES[:1]), statistics_of(FEATURES))


def test_kl_direction_is_reference_against_generated() -> None:
    reference, generated = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    assert kl_softmax(reference, generated) == pytest.approx(1.4225030, abs=1e-6)
    assert kl_softmax(generated, reference) == pytest.approx(1.2270794, abs=1e-6)
    assert kl_marginal(reference, generated) == pytest.approx(1.4225030, abs=1e-6)


def test_kl_of_equal_posteriors_is_zero() -> None:
    assert kl_softmax(FEATURES, FEATURES) == pytest.approx(0, abs=1e-4)
    assert kl_sigmoid(FEATURES, FEATURES) == pytest.approx(0, abs=1e-4)
    assert kl_marginal(FEATURES, FEATURES.flip(0)) == pytest.approx(0, abs=1e-4)


def test_kl_sigmoid_sums_the_positive_terms() -> None:
    # p = 1/2 against q = 3/4: 1/2 log(1/2 / 3/4) per class.
    reference, generated = torch.zeros(1, 2), torch.full((1, 2), math.log(3))
    assert kl_sigmoid(reference, generated) == pytest.approx(math.log(2 / 3), abs=1e-5)


def test_kl_refuses_unequal_sets() -> None:
    with pytest.raises(ValueError, match="one reference per generated clip"):
        kl_softmax(FEATURES[:3], FEATURES[:4])


def test_inception_score_bounds() -> None:
    constant = torch.tensor([[1.0, 2.0, 3.0]]).repeat(50, 1)
    assert inception_score(constant, splits=5).mean == pytest.approx(1, abs=1e-6)
    confident = 100 * torch.eye(7).repeat(20, 1)
    assert inception_score(confident).mean == pytest.approx(7, abs=1e-6)
    assert inception_score(confident, splits=10).mean <= 7
    with pytest.raises(ValueError, match="splits"):
        inception_score(confident[:3], splits=10)


def test_label_accuracy() -> None:
    assert label_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(ValueError, match="empty set"):
        label_accuracy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
