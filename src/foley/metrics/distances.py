"""Distances between sets of features: Frechet, Frechet at infinite n, and the kernel audio distance.

With Gaussians (m, S) fitted to the features of both sets, the Frechet distance is (Heusel et al. 2017, equation 6)

    FD = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))                                            (1)

The kernel audio distance (Chung et al. 2025) assumes no distribution: it is the squared maximum mean discrepancy

    KAD = 100 (E k(x, x') + E k(y, y') - 2 E k(x, y)),   k(x, y) = exp(-|x - y|^2 / (2 s^2))          (2)

over pairs of different clips, with s the median distance in the reference.

Gaussians and sums are computed in float64, a kernel's values in the precision of the features. Time and memory grow
with the clips, not with their pairs: from a size on, a fixed draw of the pairs is taken, or those within parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

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

MOST_TOGETHER = 10_000
"""Vectors of a set of which all pairs are taken; a larger set is dealt into parts, and a pair is of one part."""

_BLOCK_ROWS = 512
_CHUNK_ROWS = 8192
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
        """Of the unbiased covariance of `features [N, D]`, each `counts [N]` times; ValueError below two vectors.

        Part by part, by the QR decomposition of the vectors, which never squares them as a covariance does.
        """
        weights = torch.ones(len(features)).double() if counts is None else counts
        total = float(weights.sum())
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {total:g}; add clips to the set")
        parts = list(zip(features.split(_CHUNK_ROWS), weights.split(_CHUNK_ROWS), strict=True))
        mean = torch.stack([own @ rows.double() for rows, own in parts]).sum(dim=0) / total
        root = torch.empty(0, features.shape[1], dtype=torch.float64)
        for rows, own in parts:
            scaled = (rows.double() - mean) * (own / (total - 1)).sqrt()[:, None]
            root = torch.linalg.qr(torch.cat([root, scaled]), mode="r").R
        return cls(mean, root)

    def distance(self, other: "GaussianRoot") -> float:
        """Equation (1) of this module.

        The square root's eigenvalues are the singular values of `root_a root_b^T`: real, stable, and valid for
        singular covariances.
        """
        return self.distance_by(other, singular_vectors(self.root @ other.root.T)[1])

    def distance_by(self, other: "GaussianRoot", overlap: Tensor) -> float:
        """The same, where those singular values are known."""
        traces = self.root.square().sum() + other.root.square().sum()
        return max(float((self.mean - other.mean).square().sum() + traces - 2 * overlap.sum()), 0.0)


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U [N, K]`, values `[K]` in no order and `V [M, K]` with `matrix [N, M] = U diag(values) V^T`, K = min(N, M).

    By the eigenvectors of the smaller Gram matrix, in less than half of LAPACK's time for thousands of rows. As the
    values are lengths of `matrix V`, not roots of eigenvalues, they are exact to the rounding of the largest; those
    below 1e-8 of it are of the right size.

    >>> left, values, right = singular_vectors(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> values.tolist(), (left * values @ right.T).tolist()
    ([2.0, 3.0], [[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = singular_vectors(matrix.T)
        return left, values, right
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    scaled = matrix @ vectors
    values = scaled.norm(dim=0)
    return scaled / values.clamp_min(torch.finfo(values.dtype).tiny), values, vectors


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


@dataclass(frozen=True)
class Slopes:
    """How a Frechet distance changes with how often each vector of a set counts: its influence function.

    Of a vector x of the generated set of n vectors, with c = x - m_b, the derivative of equation (1) is

        (|c|^2 - c^T T c - tr(S_b) + tr((S_a S_b)^(1/2))) / (n - 1) + 2 c^T (m_b - m_a) / n                 (3)

    where T is the linear map that carries the generated Gaussian onto the reference, and likewise of the reference.

    Args:
        own: the Gaussian of the set.
        transport: T, `[D, D]`.
        shift: its mean less the other's, `[D]`.
        overlap: the trace of the square root.
    """

    own: GaussianRoot
    transport: Tensor
    shift: Tensor
    overlap: float

    def of(self, features: Tensor) -> Tensor:
        """Equation (3) of each of the set's vectors `[N, D]`."""
        constant, found = self.own.root.square().sum() - self.overlap, []
        for rows in features.split(_CHUNK_ROWS):
            centred = rows.double() - self.own.mean
            spread = centred.square().sum(dim=1) - ((centred @ self.transport) * centred).sum(dim=1) - constant
            found.append(spread / (len(features) - 1) + 2 * (centred @ self.shift) / len(features))
        return torch.cat(found)

    def plus(self, other: "Slopes", weight: float) -> "Slopes":
        """Those of a weighted sum of distances of one set."""
        return replace(
            self,
            transport=self.transport + weight * other.transport,
            shift=self.shift + weight * other.shift,
            overlap=self.overlap + weight * other.overlap,
        )


def frechet_slopes(a: GaussianRoot, b: GaussianRoot) -> tuple[float, Slopes, Slopes]:
    """The Frechet distance of two Gaussians, and its slopes for the vectors of either.

    >>> sets = torch.randn(50, 3), torch.randn(60, 3) + 1
    >>> value, _, slopes = frechet_slopes(*map(GaussianRoot.fit, sets))
    >>> abs(value - frechet_distance(*sets)) < 1e-9, slopes.of(sets[1]).shape
    (True, torch.Size([60]))
    """
    left, overlap, right = singular_vectors(a.root @ b.root.T)
    kept = overlap > 1e-9 * overlap.max()  # the rest adds nothing but rounding
    bases, trace = (right[:, kept], left[:, kept]), float(overlap.sum())
    # T from a to b is root_b^T V V^T root_b with V the right vectors over the roots of the values, and likewise back.
    halves = [other.root.T @ (basis / overlap[kept].sqrt()) for other, basis in zip((b, a), bases, strict=True)]
    maps, shift = [half @ half.T for half in halves], a.mean - b.mean
    return a.distance_by(b, overlap), Slopes(a, maps[0], shift, trace), Slopes(b, maps[1], -shift, trace)


def dealt_parts(clips: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Parts of a shuffle of `clips [N]`, and the weight of each in the extrapolation of `extrapolated_distance`.

    The line's value at k = 0 is a weighted sum of the parts' distances; what has no weight, as the thirds, is left out.
    """
    shuffled = clips[torch.randperm(len(clips), generator=torch_generator("extrapolation", len(clips), 0))]
    numbers = range(1, MOST_PARTS + 1)  # n = N / k, so that k grows as 1 / n does
    middle = sum(numbers) / MOST_PARTS
    spread = sum((k - middle) ** 2 for k in numbers)
    for k in numbers:
        weight = 1 / MOST_PARTS - middle * (k - middle) / spread  # of least squares
        if weight:
            yield from ((weight / k, part) for part in shuffled.tensor_split(k))


def extrapolated_distance(distance: Callable[[Tensor], float], counts: Tensor) -> float:
    """A distance at infinitely many clips (Chong and Forsyth 2020, sec. 4; for audio Gui et al. 2024, sec. 3.3).

    The bias is linear in 1/n. The set is dealt into k = 1, 2, 3, 4 equal parts, so that n = N / k; a line through the
    mean distance of each k's parts is read off at k = 0. What bias the reference has stays.

    Args:
        distance: of a part of the set, given as counts of its clips `[N]`.
        counts: of the clips in the whole set `[N]`.
    """
    clips = torch.arange(len(counts)).repeat_interleave(counts.long())
    parts = dealt_parts(clips)
    return sum(weight * distance(part.bincount(minlength=len(counts)).double()) for weight, part in parts)


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
    count = len(features) * (len(features) - 1) // 2
    if count > _BANDWIDTH_PAIRS:
        numbers = torch.randint(count, (_BANDWIDTH_PAIRS,), generator=torch_generator("bandwidth", len(features)))
    else:
        numbers = torch.arange(count)
    pairs = pairs_by_number(numbers, len(features)).split(_BLOCK_ROWS, dim=1)
    distances = [(features[first].double() - features[second].double()).norm(dim=1) for first, second in pairs]
    median = float(torch.cat(distances).median())
    if not median > 0:
        raise ValueError(f"KAD: {len(features)} reference features have a median distance of {median}; they are alike")
    return median


def pairs_by_number(numbers: Tensor, n: int) -> Tensor:
    """`[2, K]`: the pairs i < j of `n` at those places of the list (0, 1), (0, 2), ..., (1, 2), ... of all of them.

    >>> pairs_by_number(torch.tensor([0, 2, 3, 5]), 4).tolist()
    [[0, 0, 1, 2], [1, 3, 2, 3]]
    """
    # Pairs before those of row i: i n - i (i + 1) / 2. Its inverse is off by one at most, by rounding.
    first = ((2 * n - 1 - ((2 * n - 1.0) ** 2 - 8 * numbers.double()).sqrt()) / 2).long()
    first -= (_before(first, n) > numbers).long()
    first += (_before(first + 1, n) <= numbers).long()
    return torch.stack([first, numbers - _before(first, n) + first + 1])


def _before(row: Tensor, n: int) -> Tensor:
    return row * n - row * (row + 1) // 2


def squared_discrepancy(
    reference: Tensor, generated: Tensor, kernel: Kernel, counts: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) of `[N, D]` and `[M, D]`; may be < 0.

    Args:
        counts: how often each feature counts in each of R sets, `[R, N]` and `[R, M]`; None: once, R = 1. A feature
            makes no pair with itself or its repeats.
    Returns `[R]`. Of more than `MOST_TOGETHER` vectors, of either set, the pairs are those within parts of a fixed deal
    (as in the B-test, Zaremba et al. 2013), which is as unbiased, and grows with N + M, not with their product.
    """
    if min(len(reference), len(generated)) < 2:
        raise ValueError(f"KAD needs 2 clips in each set, got {len(reference)} and {len(generated)}")
    ones = [torch.ones(1, len(features)).double() for features in (reference, generated)]
    sets = [
        _Dealt(features.to(torch.promote_types(features.dtype, torch.float32)), own, _deal(name, len(features)))
        for name, features, own in zip(("reference", "generated"), (reference, generated), counts or ones, strict=True)
    ]
    reference_set, generated_set = sets
    within = _pair_mean(reference_set, reference_set, kernel) + _pair_mean(generated_set, generated_set, kernel)
    return within - 2 * _pair_mean(reference_set, generated_set, kernel)


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
    if kernel is None:  # of differences alone: about the mean, their squares are the most exact
        kernel, centre = GaussianKernel(median_bandwidth(reference)), reference.mean(dim=0)
        reference, generated = reference - centre, generated - centre
    return SCALE * squared_discrepancy(reference, generated, kernel, counts)


@dataclass(frozen=True)
class _Dealt:
    """`features [N, D]` with `counts [R, N]`, and the indices of its parts."""

    features: Tensor
    counts: Tensor
    parts: Sequence[Tensor]

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        """Features and counts of a part; after the last comes the first."""
        chosen = self.parts[number % len(self.parts)]
        return self.features[chosen], self.counts[:, chosen]


def _deal(name: str, n: int) -> Sequence[Tensor]:
    """Sets of other names are dealt independently, or clips of one caption would meet more often than others do."""
    if n <= MOST_TOGETHER:
        return [torch.arange(n)]
    return torch.randperm(n, generator=torch_generator("kernel", name, n)).tensor_split(ceil(n / MOST_TOGETHER))


def _pair_mean(x: _Dealt, y: _Dealt, kernel: Kernel) -> Tensor:
    """Weighted mean of `kernel` over the pairs of parts `[R]`; no vector makes one with itself."""
    total, pairs = torch.zeros(2, len(x.counts), dtype=torch.float64)
    for number in range(max(len(x.parts), len(y.parts))):
        (rows, row_counts), (columns, column_counts) = x.part(number), y.part(number)
        total += _pair_sum(rows, columns, kernel, row_counts, column_counts, own=x is y)
        pairs += row_counts.sum(dim=1) * column_counts.sum(dim=1)
        if x is y:
            pairs -= row_counts.square().sum(dim=1)
    return total / pairs


def _pair_sum(x: Tensor, y: Tensor, kernel: Kernel, x_counts: Tensor, y_counts: Tensor, own: bool) -> Tensor:
    """`[R]`, in blocks of rows; of a set's own pairs the half beyond the diagonal, twice."""
    total = torch.zeros(len(x_counts), dtype=torch.float64)
    weights = y_counts.to(y.dtype)
    for start in range(0, len(x), _BLOCK_ROWS):
        rows, first = slice(start, start + _BLOCK_ROWS), start if own else 0
        values = kernel(x[rows], y[first:])
        if own:
            values.diagonal().zero_()
            values[:, _BLOCK_ROWS:] *= 2  # within the block both orders are there
        total += (x_counts[:, rows] * (weights[:, first:] @ values.T)).sum(dim=1)
    return total
