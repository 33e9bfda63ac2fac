"""Distances between sets of features: Frechet, Frechet at infinite n, and the kernel audio distance.

With Gaussians (m, S) fitted to the features of both sets, the Frechet distance is (Heusel et al. 2017, equation 6)

    FD = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))                                            (1)

The kernel audio distance (Chung et al. 2025) assumes no distribution: it is the squared maximum mean discrepancy

    KAD = 100 (E k(x, x') + E k(y, y') - 2 E k(x, y)),   k(x, y) = exp(-|x - y|^2 / (2 s^2))          (2)

over pairs of different clips, with s the median distance in the reference. All is computed in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foley.core.logs import get_logger
from foley.core.seeding import torch_generator

SCALE = 100.0
"""KAD is the squared discrepancy in hundredths, as its authors report it."""

MOST_PARTS = 4
"""A set is dealt into 1, 2, ... equal parts, up to so many, to extrapolate its distance."""
FEWEST_CLIPS = 2 * MOST_PARTS
"""Of an extrapolated distance: a covariance takes two."""

_BLOCK_ROWS = 512
_BANDWIDTH_PAIRS = 100_000

_log = get_logger(__name__)


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
        values, vectors = torch.linalg.eigh(covariance.double())  # S = V diag(values) V^T
        return cls(mean.double(), (vectors * values.clamp_min(0).sqrt()).T)  # rounding may make a zero negative

    @classmethod
    def fit(cls, features: Tensor, counts: Tensor | None = None) -> "GaussianRoot":
        """Of the unbiased covariance of `features [N, D]`, each `counts [N]` times; ValueError below two vectors."""
        weights = torch.ones(len(features)).double() if counts is None else counts
        kept, weights = features[weights > 0].double(), weights[weights > 0]
        total = float(weights.sum())
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {total:g}; add clips to the set")
        mean = weights @ kept / total
        root = (kept - mean) * (weights / (total - 1)).sqrt()[:, None]  # [N, D], and root^T root is the covariance
        return cls(mean, root) if len(root) <= root.shape[1] else cls.of(mean, root.T @ root)

    def distance(self, other: "GaussianRoot") -> float:
        """Equation (1) of this module.

        The square root's eigenvalues are the singular values of `root_a root_b^T`: real, stable, and valid for
        singular covariances.
        """
        overlap = torch.linalg.svdvals(self.root @ other.root.T).sum()
        traces = self.root.square().sum() + other.root.square().sum()
        return max(float((self.mean - other.mean).square().sum() + traces - 2 * overlap), 0.0)


def gaussian_frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Frechet distance of two Gaussians, see `GaussianRoot.distance`.

    >>> zero, identity = torch.zeros(8), torch.eye(8)
    >>> round(gaussian_frechet_distance(zero, identity, zero + 1, 4 * identity), 6)  # 8 of the means, 8 (1 + 4 - 4)
    16.0
    """
    return GaussianRoot.of(mean_a, covariance_a).distance(GaussianRoot.of(mean_b, covariance_b))


def singular_set(name: str, n: int, dimension: int) -> str:
    """What is to be said of a set whose covariance is singular; empty for a regular one.

    >>> singular_set("generated", 24, 128).partition(",")[0]
    'the generated set has n = 24 <= 128 features'
    """
    if n > dimension:
        return ""
    return (
        f"the {name} set has n = {n} <= {dimension} features, so its covariance is singular and the distance biased "
        "upwards; compare only with distances at the same n"
    )


def frechet_distance(reference: Tensor, generated: Tensor) -> float:
    """Of the features `[N, D]` and `[M, D]` of two sets; warns where one is too small for a regular covariance.

    >>> features = torch.randn(100, 4)
    >>> round(frechet_distance(features, features + 2), 6)  # a shift of 2 in each of 4 dimensions
    16.0
    """
    for name, features in (("reference", reference), ("generated", generated)):
        if remark := singular_set(name, *features.shape):
            _log.warning("Frechet distance: %s", remark)
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
    for parts in range(1, MOST_PARTS + 1):  # n = N / parts, so parts grows as 1 / n does
        found = [distance(part.bincount(minlength=len(counts)).double()) for part in shuffled.tensor_split(parts)]
        means.append(sum(found) / parts)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (range(1, MOST_PARTS + 1), means))
    # Least squares: the line's value at 0 parts, where 1 / n is 0.
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


@dataclass(frozen=True)
class GaussianKernel:
    """`exp(-|x - y|^2 / (2 bandwidth^2))`."""

    bandwidth: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T  # |x - y|^2, [N, M]
        return (-squares.clamp_min(0) / (2 * self.bandwidth**2)).exp()


Kernel = Callable[[Tensor, Tensor], Tensor]
"""`(x [N, D], y [M, D]) -> [N, M]`."""


def median_bandwidth(features: Tensor) -> float:
    """Median distance of pairs of `features [N, D]`: the bandwidth that KAD's authors choose, from the reference.

    All pairs of a small set, a fixed draw of them from a larger one; raises ValueError where they do not differ.
    """
    first, second = torch.triu_indices(len(features), len(features), offset=1)
    if len(first) > _BANDWIDTH_PAIRS:
        chosen = torch.randint(len(first), (_BANDWIDTH_PAIRS,), generator=torch_generator("bandwidth", len(features)))
        first, second = first[chosen], second[chosen]
    median = float((features[first].double() - features[second].double()).norm(dim=1).median())
    if not median > 0:
        raise ValueError(f"KAD: {len(features)} reference features have a median distance of {median}; they are alike")
    return median


def squared_discrepancy(
    reference: Tensor, generated: Tensor, kernel: Kernel, counts: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) of `[N, D]` and `[M, D]`; may be < 0.

    Args:
        counts: how often each feature counts in each of R sets, `[R, N]` and `[R, M]`; None: once, R = 1. A feature
            makes no pair with itself or its repeats.
    Returns `[R]`. Memory grows with N + M, not with their product.
    """
    if min(len(reference), len(generated)) < 2:
        raise ValueError(f"KAD needs 2 clips in each set, got {len(reference)} and {len(generated)}")
    own = counts or (torch.ones(1, len(reference)).double(), torch.ones(1, len(generated)).double())
    within = [
        _pair_mean(features, features, kernel, weights, weights, without_self=True)
        for features, weights in ((reference, own[0]), (generated, own[1]))
    ]
    return within[0] + within[1] - 2 * _pair_mean(reference, generated, kernel, *own, without_self=False)


def kernel_audio_distance(
    reference: Tensor,
    generated: Tensor,
    counts: tuple[Tensor, Tensor] | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """KAD `[R]`, equation (2), with the Gaussian kernel of the reference's median distance, or another.

    >>> reference, other = torch.randn(200, 4), torch.randn(200, 4)
    >>> kernel_audio_distance(reference, other).item() < 1 < kernel_audio_distance(reference, other + 1).item()
    True
    """
    kernel = kernel or GaussianKernel(median_bandwidth(reference))
    return SCALE * squared_discrepancy(reference, generated, kernel, counts)


def _pair_mean(x: Tensor, y: Tensor, kernel: Kernel, x_counts: Tensor, y_counts: Tensor, without_self: bool) -> Tensor:
    """Weighted mean of `kernel` over pairs `[R]`, in blocks of rows."""
    x, y = x.double(), y.double()
    total = torch.zeros(len(x_counts), dtype=torch.float64)
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        values = kernel(x[rows], y)
        if without_self:  # row i of this block is vector start + i
            values.diagonal(start).zero_()
        total += (x_counts[:, rows] * (y_counts @ values.T)).sum(dim=1)
    pairs = x_counts.sum(dim=1) * y_counts.sum(dim=1)
    return total / (pairs - x_counts.square().sum(dim=1) if without_self else pairs)
