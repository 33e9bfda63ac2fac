"""From change curves to decisions: pure functions, true where a layer computes and false where it is reused."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean


def audiocache_schedule(changes: Mapping[str, Sequence[float]], delta: float) -> dict[str, list[bool]]:
    """Per layer, compute when the changes since the last computation reach `delta` (AudioCache, Algorithm 1, eq. 2).

    Args:
        changes: for each layer, its relative-L1 change at each evaluation since the one before (eq. 1); evaluation 0
            has no predecessor, always computes, and its value is ignored.
        delta: 0 computes always.
    """
    if delta < 0:
        raise ValueError(f"AudioCache's threshold must be at least 0 (0 computes always), got {delta}")
    return {layer: _accumulate(curve, delta) for layer, curve in changes.items()}


def _accumulate(curve: Sequence[float], delta: float) -> list[bool]:
    decisions, accumulated = [True], 0.0
    for change in curve[1:]:
        accumulated += change
        decisions.append(accumulated >= delta)
        if decisions[-1]:
            accumulated = 0.0
    return decisions


def layer_kind(layer: str) -> str:
    """The kind of a layer is the last part of its name: `in_blocks.0.feed_forward`, `transformer_blocks.3.attn1`."""
    return layer.rpartition(".")[2]


def smoothcache_schedule(
    errors: Mapping[str, Sequence[Sequence[float]]], alpha: float, num_steps: int
) -> dict[str, list[bool]]:
    """One schedule per kind of layer, from errors averaged over its blocks (SmoothCache, section 2).

    Args:
        errors: for each layer, at `[k - 1][i]`, its relative-L1 change from step i to step i + k; the number of
            distances is the largest lookahead.
        alpha: the largest mean error that is let pass.
    """
    if alpha < 0:
        raise ValueError(f"SmoothCache's alpha must be at least 0, got {alpha}")
    by_kind = groupby(sorted(errors, key=layer_kind), key=layer_kind)
    return {
        kind: _look_ahead(_mean_errors([errors[layer] for layer in layers]), alpha, num_steps)
        for kind, layers in by_kind
    }


def _mean_errors(blocks: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Average over blocks what is indexed by block, distance and step."""
    return [[fmean(step) for step in zip(*distance, strict=True)] for distance in zip(*blocks, strict=True)]


def _look_ahead(errors: Sequence[Sequence[float]], alpha: float, num_steps: int) -> list[bool]:
    decisions, step = [False] * num_steps, 0
    while step < num_steps:
        decisions[step] = True
        passing = [k for k, curve in enumerate(errors, start=1) if step < len(curve) and curve[step] <= alpha]
        step += max(passing, default=0) + 1
    decisions[-1] = True
    return decisions


def fora_schedule(num_steps: int, interval: int) -> list[bool]:
    """Compute every `interval`-th step, whatever the layer (FORA); 1 computes always."""
    if interval < 1:
        raise ValueError(f"FORA's interval must be at least 1 (1 computes always), got {interval}")
    return [step % interval == 0 for step in range(num_steps)]
