"""Kernel audio distance (Chung et al. 2025): maximum mean discrepancy without assumptions on the distribution."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foley.seeding import torch_generator

SCALE = 100.0
"""KAD is the squared discrepancy in hundredths, as its authors report it."""

_BLOCK_ROWS = 512
_BANDWIDTH_PAIRS = 100_000


@dataclass(frozen=True)
class GaussianKernel:
    """`exp(-|x - y|^2 / (2 bandwidth^2))`."""

    bandwidth: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
        return (-squares.clamp_min(0) / (2 * self.bandwidth**2)).exp()


Kernel = Callable[[Tensor, Tensor], Tensor]


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
    """KAD `[R]` with the Gaussian kernel of the reference's median distance, or another."""
    kernel = kernel or GaussianKernel(median_bandwidth(reference))
    return SCALE * squared_discrepancy(reference, generated, kernel, counts)


def _pair_mean(x: Tensor, y: Tensor, kernel: Kernel, x_counts: Tensor, y_counts: Tensor, without_self: bool) -> Tensor:
    """Weighted mean of `kernel` over pairs `[R]`, in blocks of rows."""
    x, y = x.double(), y.double()
    total = torch.zeros(len(x_counts), dtype=torch.float64)
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        values = kernel(x[rows], y)
        if without_self:
            values.diagonal(start).zero_()
        total += (x_counts[:, rows] * (y_counts @ values.T)).sum(dim=1)
    pairs = x_counts.sum(dim=1) * y_counts.sum(dim=1)
    return total / (pairs - x_counts.square().sum(dim=1) if without_self else pairs)
