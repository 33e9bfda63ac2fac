"""Distances between sets of sounds, from the features and logits of an extractor. Everything is computed in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foley.logs import get_logger
from foley.seeding import torch_generator

log = get_logger(__name__)

KL_EPSILON = 1e-6


class GaussianStatistics:
    """Mean and covariance of a stream of feature vectors in one pass (Chan, Golub and LeVeque 1979, eq. 2.1)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> "GaussianStatistics":
        """Add `features [N, D]`; returns self."""
        batch = features.detach().to("cpu", torch.float64)
        if batch.shape[0] == 0:
            return self
        total = self.count + batch.shape[0]
        batch_mean = batch.mean(dim=0)
        centred = batch - batch_mean
        shift = batch_mean - self.mean
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * batch.shape[0] / total)
        self.mean = self.mean + shift * (batch.shape[0] / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[D, D]`; raises ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}; add clips to the set")
        return self._scatter / (self.count - 1)


@dataclass(frozen=True)
class Score:
    """A metric and the spread over its splits (0 where there is one split)."""

    mean: float
    std: float


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def gaussian_frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """`|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Heusel et al. 2017, eq. 6).

    `S_a S_b` is similar to the symmetric `R S_b R` with `R = S_a^(1/2)`, so the trace of its square root is the
    sum of the square roots of the symmetric eigenvalues: real, stable, and valid for singular covariances.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        tensor.to(torch.float64) for tensor in (mean_a, covariance_a, mean_b, covariance_b)
    )
    root = _symmetric_sqrt(covariance_a)
    product = root @ covariance_b @ root
    trace_sqrt = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_sqrt
    return max(float(distance), 0.0)


def frechet_distance(reference: GaussianStatistics, generated: GaussianStatistics) -> float:
    """Frechet distance of two sets of features; warns where a set is too small for its covariance to be regular."""
    for name, statistics in (("reference", reference), ("generated", generated)):
        dimension = statistics.mean.numel()
        if statistics.count <= dimension:
            log.warning(
                "Frechet distance: the %s set has n = %d <= %d features, so its covariance is singular and the "
                "distance biased upwards; compare only with distances at the same n",
                name,
                statistics.count,
                dimension,
            )
    return gaussian_frechet_distance(reference.mean, reference.covariance, generated.mean, generated.covariance)


def _kl(reference: Tensor, generated: Tensor) -> Tensor:
    """`sum_c p log(p / (q + eps))` per row, with `0 log 0 = 0`."""
    return (torch.xlogy(reference, reference) - reference * (generated + KL_EPSILON).log()).sum(dim=-1)


def _check_pairs(reference_logits: Tensor, generated_logits: Tensor) -> None:
    if reference_logits.shape != generated_logits.shape:
        raise ValueError(
            f"paired KL needs one reference per generated clip, got logits of shape {tuple(reference_logits.shape)} "
            f"and {tuple(generated_logits.shape)}"
        )


def kl_softmax(reference_logits: Tensor, generated_logits: Tensor) -> float:
    """Mean KL(reference || generated) of paired class posteriors from logits `[N, K]`, in nats (AudioLDM-eval)."""
    _check_pairs(reference_logits, generated_logits)
    return float(_kl(reference_logits.double().softmax(-1), generated_logits.double().softmax(-1)).mean())


def kl_sigmoid(reference_logits: Tensor, generated_logits: Tensor) -> float:
    """As `kl_softmax` with independent sigmoid activations: the positive terms only, as AudioLDM-eval sums them."""
    _check_pairs(reference_logits, generated_logits)
    return float(_kl(reference_logits.double().sigmoid(), generated_logits.double().sigmoid()).mean())


def kl_marginal(reference_logits: Tensor, generated_logits: Tensor) -> float:
    """KL(reference || generated) of the mean class posteriors of two unpaired sets `[N, K]` and `[M, K]`."""
    reference = reference_logits.double().softmax(-1).mean(dim=0)
    return float(_kl(reference, generated_logits.double().softmax(-1).mean(dim=0)))


def inception_score(logits: Tensor, splits: int = 1) -> Score:
    """`exp(E KL(p(y|x) || p(y)))` over `splits` parts of a fixed shuffle of logits `[N, K]` (Salimans et al. 2016)."""
    if not 1 <= splits <= logits.shape[0]:
        raise ValueError(f"inception score over {splits} splits needs at least that many clips, got {logits.shape[0]}")
    order = torch.randperm(logits.shape[0], generator=torch_generator("inception_score", logits.shape[0]))
    scores = []
    for part in logits[order].double().softmax(-1).tensor_split(splits):
        marginal = part.mean(dim=0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(dim=-1)
        scores.append(divergence.mean().exp())
    values = torch.stack(scores)
    return Score(float(values.mean()), float(values.std(correction=0)))


def label_accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of rows of `logits [N, K]` whose largest entry is at `targets [N]`; raises ValueError on an empty set."""
    if targets.numel() == 0:
        raise ValueError("label accuracy of an empty set is undefined; give at least one labelled clip")
    return float((logits.argmax(dim=-1) == targets).double().mean())
