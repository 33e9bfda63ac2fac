"""SmoothCache (Liu et al. 2024): layers of one kind share a schedule, which looks ahead as far as the error allows.

Where AudioCache adds up the changes from step to step, SmoothCache measures what a reuse over k steps costs: the change
of a layer's output from step i to step i + k, for every k up to a largest lookahead (Section 2, Fig. 2). The curves of
all blocks are averaged, so that self-attention, cross-attention and feed-forward layers have one schedule each. From
step i on, the largest k whose mean error is at most alpha is taken: compute at i, reuse at i + 1 to i + k, go on at
i + k + 1. The first and the last step always compute.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Unpack

from foley.accel.caching.calibration import CalibratedCache, CalibratedOptions, Calibration
from foley.accel.caching.reuse import ReuseChoice
from foley.accel.caching.schedule import UNCONSTRAINED, Constraints
from foley.accel.layers import layer_kind
from foley.core.numbers import COUNT, NOT_NEGATIVE


def smoothcache_schedule(
    errors: Mapping[str, Sequence[Sequence[float]]],
    alpha: float,
    num_steps: int,
    constraints: Constraints = UNCONSTRAINED,
) -> dict[str, list[bool]]:
    """One schedule per kind of layer, from errors averaged over its blocks (SmoothCache, section 2).

    Args:
        errors: for each layer, at `[k - 1][i]`, its relative-L1 change from step i to step i + k; the number of
            distances is the largest lookahead.
        alpha: the largest mean error that is let pass.
        constraints: what else computes; no lookahead goes beyond it.

    Raises:
        ValueError: alpha is negative.

    Example:
        From step 0 one step can be reused, and from step 2 none.

        >>> errors = {"0.feed_forward": [[0.1, 0.2, 0.9], [0.4, 0.5]], "1.feed_forward": [[0.1, 0.2, 0.9], [0.8, 0.9]]}
        >>> smoothcache_schedule(errors, alpha=0.5, num_steps=4)
        {'feed_forward': [True, False, True, True]}
    """
    if alpha < 0:
        raise ValueError(f"SmoothCache's alpha must be at least 0, got {alpha}")
    by_kind = groupby(sorted(errors, key=layer_kind), key=layer_kind)  # groupby joins neighbours alone, hence sorted
    return {
        kind: _look_ahead(_mean_errors([errors[layer] for layer in layers]), alpha, num_steps, constraints)
        for kind, layers in by_kind
    }


def _mean_errors(blocks: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Average over blocks what is indexed by block, distance and step."""
    # [blocks][distances][steps] to [distances][steps].
    return [[fmean(step) for step in zip(*distance, strict=True)] for distance in zip(*blocks, strict=True)]


def _look_ahead(
    errors: Sequence[Sequence[float]], alpha: float, num_steps: int, constraints: Constraints
) -> list[bool]:
    decisions, step = [False] * num_steps, 0  # reuse, where nothing else is decided
    while step < num_steps:
        decisions[step] = True
        # Near the end there are fewer distances: no curve of distance k tells of step i with i + k beyond the last.
        passing = [k for k, curve in enumerate(errors, start=1) if step < len(curve) and curve[step] <= alpha]
        ahead = step + max(passing, default=0) + 1  # the largest, even where a smaller k in between does not pass
        step = min(ahead, constraints.next_due(step, num_steps))
    decisions[-1] = True  # the last step computes, wherever the lookahead led
    return decisions


class SmoothCache(CalibratedCache):
    """All layers of a kind share one schedule, which looks ahead while the mean error is at most `alpha`.

    Args:
        calibration_dir, reuse, options: as `CalibratedCache` takes them.
        alpha: the largest mean error that is let pass; 0 computes always.
        max_lookahead: the largest number of evaluations in a row that reuse one output.

    Example: as that of `foley.accel.caching.audiocache.AudioCache`, with `SmoothCache(folder.name, alpha=0.15)`.

        >>> from foley.accel import SmoothCache
        >>> cache = SmoothCache("no such folder", alpha=0.15)
        >>> cache.require_calibration("ddim", 50, guidance_scale=3.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such folder/ddim_50.json does not exist: this system is not calibrated ...
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        alpha: float,
        max_lookahead: int = 3,
        reuse: ReuseChoice = "hold",
        **options: Unpack[CalibratedOptions],
    ) -> None:
        policy = {"name": "smoothcache", "alpha": alpha, "max_lookahead": max_lookahead}
        super().__init__(calibration_dir, policy, reuse, **options)
        NOT_NEGATIVE.check("alpha", alpha)
        COUNT.check("max_lookahead", max_lookahead)
        self._alpha = alpha
        self._max_lookahead = max_lookahead

    def decide(self, calibration: Calibration) -> dict[str, list[bool]]:
        """Each kind by itself, see `smoothcache_schedule`; raises ValueError for a lookahead that was not recorded."""
        errors, num_evaluations = calibration.errors(self._max_lookahead), calibration.signature.num_evaluations
        by_kind = smoothcache_schedule(errors, self._alpha, num_evaluations, self.constraints)
        # "self_attention" and so on, to decisions
        return {name: by_kind[layer_kind(name)] for name in calibration.layer_names}
