"""Closed forms and identities of the distances between sets."""

import logging
import math

import numpy as np
import pytest
import torch

from foley.metrics.distances import GaussianRoot, extrapolated_distance, frechet_distance, gaussian_frechet_distance
from foley.metrics.scores import inception_scores, kl_marginal, kl_sigmoid, kl_softmax, label_accuracy

FEATURES = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


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


def test_covariances_stay_exact_far_from_zero() -> None:
    fitted = GaussianRoot.fit(FEATURES.double() + 1e6)
    torch.testing.assert_close(fitted.root.T @ fitted.root, FEATURES.double().T.cov(), rtol=0, atol=1e-8)


def test_frechet_of_a_set_with_itself_is_zero_and_a_shift_adds_its_square() -> None:
    assert frechet_distance(FEATURES, FEATURES) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(FEATURES, FEATURES + 2) == pytest.approx(6 * 4, abs=1e-4)


@pytest.mark.parametrize("n", [400, 40])
def test_agrees_with_the_arithmetic_of_torch_fidelity(n: int) -> None:
    # Its `fid_statistics_to_metric`: square roots of the eigenvalues of the product, which are complex by rounding.
    generator = np.random.default_rng(n)
    first = generator.standard_normal((n, 24)) @ generator.standard_normal((24, 24))
    second = generator.standard_normal((n, 24)) + 0.3
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    shift = first.mean(axis=0) - second.mean(axis=0)
    overlap = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * overlap
    own = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert own == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [400, 5])
def test_roots_of_few_and_many_vectors_give_the_distance_of_covariances(n: int) -> None:
    first, second = FEATURES[:n].double(), 2 * FEATURES[-n:].double() + 1
    moments = [moment for features in (first, second) for moment in (features.mean(dim=0), features.T.cov())]
    expected = gaussian_frechet_distance(*moments)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_counts_are_repetitions() -> None:
    counts = torch.tensor([0.0, 3, 1, 2]).double()
    repeated = FEATURES[:4].repeat_interleave(counts.long(), dim=0)
    other = GaussianRoot.fit(FEATURES)
    distance = GaussianRoot.fit(FEATURES[:4], counts).distance(other)
    assert distance == pytest.approx(GaussianRoot.fit(repeated).distance(other), rel=1e-9)
    logits = 3 * FEATURES[:4]
    own = inception_scores(logits, counts=counts[None])[0, 0]
    whole = inception_scores(logits.repeat_interleave(counts.long(), dim=0))
    assert float(own) == pytest.approx(float(whole), rel=1e-9)


def test_extrapolation_removes_a_bias_of_one_over_n() -> None:
    counts = torch.ones(120).double()
    assert extrapolated_distance(lambda part: 3 + 50 / float(part.sum()), counts) == pytest.approx(3, abs=1e-9)


def test_extrapolated_distance_of_gaussians_comes_nearer_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(600, 12, generator=generator)
    truth = GaussianRoot(torch.zeros(12).double(), torch.eye(12).double())
    own = GaussianRoot.fit(features).distance(truth)
    extrapolated = extrapolated_distance(
        lambda part: GaussianRoot.fit(features, part).distance(truth), torch.ones(600).double()
    )
    assert abs(extrapolated) < own / 3


def test_small_sets_warn_and_single_clips_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        frechet_distance(FEATURES[:6], FEATURES)
    assert "n = 6 <= 6" in caplog.text
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        frechet_distance(FEATURES[:1], FEATURES)


def marginal(reference: torch.Tensor, generated: torch.Tensor) -> float:
    return float(kl_marginal(reference, generated, [torch.ones(1, len(x)).double() for x in (reference, generated)]))


def test_kl_direction_is_reference_against_generated() -> None:
    reference, generated = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    assert float(kl_softmax(reference, generated)) == pytest.approx(1.4225030, abs=1e-6)
    assert float(kl_softmax(generated, reference)) == pytest.approx(1.2270794, abs=1e-6)
    assert marginal(reference, generated) == pytest.approx(1.4225030, abs=1e-6)


def test_kl_of_equal_posteriors_is_zero() -> None:
    assert kl_softmax(FEATURES, FEATURES).abs().max() < 1e-4
    assert kl_sigmoid(FEATURES, FEATURES).abs().max() < 1e-4
    assert marginal(FEATURES, FEATURES.flip(0)) == pytest.approx(0, abs=1e-4)


def test_kl_sigmoid_sums_the_positive_terms() -> None:
    # p = 1/2 against q = 3/4: 1/2 log(1/2 / 3/4) per class.
    reference, generated = torch.zeros(1, 2), torch.full((1, 2), math.log(3))
    assert float(kl_sigmoid(reference, generated)) == pytest.approx(math.log(2 / 3), abs=1e-5)


def test_kl_refuses_unequal_sets() -> None:
    with pytest.raises(ValueError, match="one reference per generated clip"):
        kl_softmax(FEATURES[:3], FEATURES[:4])


def test_inception_score_bounds() -> None:
    constant = torch.tensor([[1.0, 2.0, 3.0]]).repeat(50, 1)
    assert float(inception_scores(constant, splits=5).mean()) == pytest.approx(1, abs=1e-6)
    confident = 100 * torch.eye(7).repeat(20, 1)
    assert float(inception_scores(confident)) == pytest.approx(7, abs=1e-6)
    assert inception_scores(confident, splits=10).mean() <= 7
    with pytest.raises(ValueError, match="splits"):
        inception_scores(confident[:3], splits=10)


def test_label_accuracy() -> None:
    assert label_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(ValueError, match="empty set"):
        label_accuracy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
