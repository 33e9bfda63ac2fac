"""Confidence intervals by bootstrap over clips (Efron 1979): how far a score would move with other clips.

Clips are drawn with replacement; what a clip gives (its windows, its pair) is drawn with it. Draws are counts `[R, n]`,
of which the first row is all ones: a score of counts in row 0 is the score itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foley.seeding import numpy_generator

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A score, its interval (None where nothing was drawn), and the n it was measured on, as text."""

    value: float
    low: float | None
    high: float | None
    n: str


def draw_counts(n: int, resamples: int, name: str) -> Tensor:
    """How often each of `n` clips is in each of the `resamples` sets `[1 + resamples, n]`; row 0 is all ones.

    The same name and sizes give the same draws; sets of other names are drawn independently.
    """
    generator = numpy_generator("bootstrap", name, n)
    drawn = generator.multinomial(n, [1 / n] * n, size=resamples)
    return torch.cat([torch.ones(1, n), torch.from_numpy(drawn)]).double()


def estimate(values: Tensor, n: str, floor: float | None = None) -> Estimate:
    """The score in `values[0]` with the interval of the others, `values [1 + R]`.

    A distance of resampled sets is biased upwards, for they hold repeats: the bias of the distance itself, once more.
    The quantiles are therefore moved by the difference between their mean and the score, so that the interval says how
    the score scatters at this n. It says nothing of the bias that is left in the score.

    Args:
        floor: the least value that the score can have.
    """
    value = float(values[0])
    if len(values) == 1:
        return Estimate(value, None, None, n)
    tail = (1 - CONFIDENCE) / 2
    quantiles = values[1:].quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype))
    low, high = (quantiles - values[1:].mean() + value).tolist()
    return Estimate(value, low if floor is None else max(low, floor), high, n)
