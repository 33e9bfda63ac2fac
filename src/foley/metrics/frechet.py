"""Frechet distances between sets of features. Everything is computed in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foley.logs import get_logger
from foley.seeding import torch_generator

log = get_logger(__name__)

_PARTS = (1, 2, 3, 4)


@dataclass(frozen=True)
class GaussianRoot:
    """A Gaussian as its `mean [D]` and a `root [K, D]` of its covariance: `root^T root`, with K = min(N, D).

    Distances need no more, and with fewer vectors than features it is the smaller object by far.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> "GaussianRoot":
        """From `covariance [D, D]`, which may be singular."""
        values, vectors = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), (vectors * values.clamp_min(0).sqrt()).T)

    @classmethod
    def fit(cls, features: Tensor, counts: Tensor | None = None) -> "GaussianRoot":
        """Of the unbiased covariance of `features [N, D]`, each `counts [N]` times; ValueError below two vectors."""
        weights = torch.ones(len(features)).double() if counts is None else counts
        kept, weights = features[weights > 0].double(), weights[weights > 0]
        total = float(weights.sum())
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {total:g}; add clips to the set")
        mean = weights @ kept / total
        root = (kept - mean) * (weights / (total - 1)).sqrt()[:, None]
        return cls(mean, root) if len(root) <= root.shape[1] else cls.of(mean, root.T @ root)

    def distance(self, other: "GaussianRoot") -> float:
        """`|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Heusel et al. 2017, eq. 6).

        The square root's eigenvalues are the singular values of `root_a root_b^T`: real, stable, and valid for
        singular covariances.
        """
        overlap = torch.linalg.svdvals(self.root @ other.root.T).sum()
        traces = self.root.square().sum() + other.root.square().sum()
        return max(float((self.mean - other.mean).square().sum() + traces - 2 * overlap), 0.0)


def gaussian_frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Frechet distance of two Gaussians, see `GaussianRoot.distance`."""
    return GaussianRoot.of(mean_a, covariance_a).distance(GaussianRoot.of(mean_b, covariance_b))


def warn_if_small(name: str, n: int, dimension: int) -> None:
    """Say that a set's covariance is singular, where it is."""
    if n <= dimension:
        log.warning(
            "Frechet distance: the %s set has n = %d <= %d features, so its covariance is singular and the "
            "distance biased upwards; compare only with distances at the same n",
            name,
            n,
            dimension,
        )


def frechet_distance(reference: Tensor, generated: Tensor) -> float:
    """Of the features `[N, D]` and `[M, D]` of two sets; warns where one is too small for a regular covariance."""
    for name, features in (("reference", reference), ("generated", generated)):
        warn_if_small(name, *features.shape)
    return GaussianRoot.fit(reference).distance(GaussianRoot.fit(generated))


def extrapolated_distance(distance: Callable[[Tensor], float], counts: Tensor, seed: int = 0) -> float:
    """A distance at infinitely many clips (Chong and Forsyth 2020, sec. 4; for audio Gui et al. 2024, sec. 3.3).

    The bias is linear in 1/n. The set is dealt into k = 1, 2, 3, 4 equal parts, so that n = N / k; a line through the
    mean distance of each k's parts is read off at k = 0. What bias the reference has stays.

    Args:
        distance: of a part of the set, given as counts of its clips `[N]`.
        counts: of the clips in the whole set `[N]`.
    """
    clips = torch.arange(len(counts)).repeat_interleave(counts.long())
    shuffled = clips[torch.randperm(len(clips), generator=torch_generator("extrapolation", len(clips), seed))]
    means = []
    for parts in _PARTS:
        found = [distance(part.bincount(minlength=len(counts)).double()) for part in shuffled.tensor_split(parts)]
        means.append(sum(found) / parts)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (_PARTS, means))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())
