"""From change curves to decisions: AudioCache, SmoothCache, FORA and a budget."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from foley.accel.caching.calibration import Calibration, calibration_stem
from foley.accel.caching.layer_cache import LayerCache, reuse_by_name
from foley.accel.caching.schedule import CacheSchedule, RunSignature
from foley.accel.layers import find_cacheable_layers, layer_kind
from foley.core.files import info_path
from foley.diffusion.context import Accelerator, RunContext

Source = Mapping[str, str | None]
"""The options by which scripts/calibrate.py knows a model."""


class Policy(Protocol):
    """From a calibration of the run's evaluations to one list of decisions per layer."""

    def __call__(self, calibration: Calibration) -> Mapping[str, Sequence[bool]]: ...


@dataclass(frozen=True)
class CalibratedPlan:
    """Reads the calibration for the run's solver and step count, and applies a policy to its curves.

    Args:
        source: of the model, for the message where there is no calibration.
        calibrated_steps: reads the calibration of another number of steps of the same solver instead.
    """

    directory: Path
    policy: Policy
    description: Mapping[str, Any]
    source: Source
    calibrated_steps: int | None = None

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """Raises FileNotFoundError if there is no such calibration, SignatureMismatchError if it is another model's."""
        signature = RunSignature.of(run, denoiser)
        calibration = self._calibration_for(run, signature)
        return CacheSchedule.from_rows(self.policy(calibration), calibration.kinds, signature, self.description)

    def require(self, solver: str | None, num_steps: int | None, guidance_scale: float | None) -> None:
        """Raises FileNotFoundError where no calibration can serve such a run; what is None is not known yet."""
        steps = self.calibrated_steps or num_steps
        file = info_path(calibration_stem(self.directory, solver or "*", steps or "*"))
        if any(self.directory.glob(file.name)):
            return
        # The pipelines of diffusers keep their own solver.
        named = None if solver is None or solver.endswith("Scheduler") else solver
        scale = None if guidance_scale is None else f"{guidance_scale:g}"
        options = {"solver": named, "prompts": "FILE", "steps": steps, "guidance_scale": scale}
        given = {**self.source, **options, "output_dir": self.directory}
        command = shlex.join(f"{key}={value}" for key, value in given.items() if value is not None)
        raise FileNotFoundError(
            f"{file} does not exist: this system is not calibrated for this solver and number of steps. "
            f"Make it with: python scripts/calibrate.py {command}"
        )

    def _calibration_for(self, run: RunContext, signature: RunSignature) -> Calibration:
        self.require(run.solver, run.num_steps, run.guidance_scale)
        stem = calibration_stem(self.directory, run.solver, self.calibrated_steps or run.num_steps)
        calibration = Calibration.load(stem)
        if self.calibrated_steps not in (None, run.num_steps):
            calibration = calibration.at(run.num_steps, run.timesteps.tolist())
        calibration.signature.require(signature, f"the calibration {stem}")
        return calibration


@dataclass(frozen=True)
class IntervalPlan:
    """Computes every layer at every `interval`-th evaluation; needs no calibration."""

    interval: int

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        kinds = {layer.name: layer.kind for layer in find_cacheable_layers(denoiser)}
        rows = dict.fromkeys(kinds, fora_schedule(run.num_evaluations, self.interval))
        description = {"name": "fora", "interval": self.interval}
        return CacheSchedule.from_rows(rows, kinds, RunSignature.of(run, denoiser), description)


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


Curves = Mapping[str, Sequence[float]]
Rows = dict[str, list[bool]]


def budget_schedule(
    changes: Curves, layer_macs: Mapping[str, int], total_macs: int, target_speedup: float, method: str = "dynamic"
) -> Rows:
    """Decisions for each layer, true where it computes, whose MACs are at most `1 / target_speedup` of the uncached.

    Args:
        changes: for each layer, its change at each evaluation since the one before; the first value is ignored.
        layer_macs: of one call of each layer.
        total_macs: of one uncached evaluation of the whole denoiser.
        target_speedup: uncached MACs over MACs; 1 computes always.
        method: "dynamic" finds each layer's best schedule for every number of computations by dynamic programming,
            and spends the budget where it removes most error for its MACs; "greedy" starts from computing always, and
            drops whichever computation costs least error for its MACs, one by one.

    Raises ValueError for an unknown method, and for a speed-up out of reach: what is not cacheable always computes, and
    each layer computes once.
    """
    methods = {"dynamic": _dynamic, "greedy": _greedy}
    if method not in methods:
        raise ValueError(f"accel.method must be one of {', '.join(methods)}, got {method!r}")
    num_evaluations = len(next(iter(changes.values())))
    layers_once = sum(layer_macs[layer] for layer in changes)
    budget = num_evaluations * (total_macs / target_speedup - (total_macs - layers_once))
    if target_speedup < 1 or budget < layers_once:
        uncached = num_evaluations * total_macs
        largest = uncached / (uncached - (num_evaluations - 1) * layers_once)
        raise ValueError(f"accel.target_speedup must lie between 1 and {largest:.3g} here, got {target_speedup:g}")
    return methods[method](changes, layer_macs, budget)


def schedule_error(changes: Curves, rows: Mapping[str, Sequence[bool]]) -> float:
    """The summed error of a schedule."""
    return sum(
        float(_interval_errors(changes[layer])[start, end])
        for layer, row in rows.items()
        for start, end in pairwise([*np.flatnonzero(row), len(row)])
    )


def _interval_errors(curve: Sequence[float]) -> NDArray[np.float64]:
    """`[E, E + 1]`: at `[c, e]` the error of computing at c and reusing until e, where the next computation is."""
    position = np.concatenate([[0.0], np.cumsum(np.asarray(curve, dtype=np.float64)[1:])])
    drift = np.maximum(position[None, :] - position[:, None], 0.0)
    drift[np.tril_indices(len(position))] = 0.0
    return np.concatenate([np.zeros((len(position), 1)), np.cumsum(drift, axis=1)], axis=1)


def _dynamic(changes: Curves, layer_macs: Mapping[str, int], budget: float) -> Rows:
    plans = {layer: _best_for_every_count(curve) for layer, curve in changes.items()}
    counts = dict.fromkeys(changes, 1)
    spare = budget - sum(layer_macs[layer] for layer in changes)
    queue: list[tuple[float, str, int]] = []

    def offer(layer: str) -> None:
        if step := _next_step(plans[layer][0], counts[layer], int(spare // layer_macs[layer])):
            gain, count = step
            heappush(queue, (-gain / layer_macs[layer], layer, count))

    for layer in changes:
        offer(layer)
    while queue:
        _, layer, count = heappop(queue)
        cost = (count - counts[layer]) * layer_macs[layer]
        if cost <= spare:
            spare, counts[layer] = spare - cost, count
        offer(layer)
    return {layer: _backtrack(plans[layer][1], count) for layer, count in counts.items()}


def _best_for_every_count(curve: Sequence[float]) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """For n = 1..E computations: the least error, and for each end the last computation that attains it."""
    intervals = _interval_errors(curve)
    size = len(intervals)
    allowed = np.where(np.arange(size)[:, None] < np.arange(size + 1)[None, :], intervals, np.inf)
    best, least, choices = allowed[0], [allowed[0, -1]], [np.zeros(size + 1, dtype=np.int64)]
    for _ in range(size - 1):
        candidates = best[:size, None] + allowed
        choices.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
        least.append(best[-1])
    return np.asarray(least), choices


def _next_step(errors: NDArray[np.float64], count: int, affordable: int) -> tuple[float, int] | None:
    """The larger count that removes most error for each computation, and that gain: a step along the convex hull.

    At most `affordable` computations more; None where none of them removes any error.
    """
    more = np.arange(count + 1, min(count + affordable, len(errors)) + 1)
    gains = (errors[count - 1] - errors[more - 1]) / (more - count)
    if not len(gains) or gains.max() <= 0:
        return None
    return float(gains.max()), int(more[gains.argmax()])


def _backtrack(choices: list[NDArray[np.int64]], count: int) -> list[bool]:
    row, end = [False] * (len(choices[0]) - 1), len(choices[0]) - 1
    for choice in reversed(choices[:count]):
        end = int(choice[end])
        row[end] = True
    return row


def _greedy(changes: Curves, layer_macs: Mapping[str, int], budget: float) -> Rows:
    errors = {layer: _interval_errors(curve) for layer, curve in changes.items()}
    size = len(next(iter(errors.values())))
    rows = {layer: [True] * size for layer in changes}
    spent = float(sum(layer_macs[layer] * size for layer in changes))

    def price(layer: str, evaluation: int) -> tuple[float, str, int]:
        previous, following = _neighbours(rows[layer], evaluation)
        table = errors[layer]
        added = table[previous, following] - table[previous, evaluation] - table[evaluation, following]
        return float(added) / layer_macs[layer], layer, evaluation

    queue = [price(layer, evaluation) for layer in changes for evaluation in range(1, size)]
    heapify(queue)
    while spent > budget:
        offered, layer, evaluation = heappop(queue)
        current = price(layer, evaluation)
        if current[0] > offered:  # a neighbour was dropped since
            heappush(queue, current)
            continue
        rows[layer][evaluation] = False
        spent -= layer_macs[layer]
    return rows


def _neighbours(row: Sequence[bool], evaluation: int) -> tuple[int, int]:
    """The computations before and after; the end of the run where none follows."""
    previous = next(index for index in range(evaluation - 1, -1, -1) if row[index])
    return previous, next((index for index in range(evaluation + 1, len(row)) if row[index]), len(row))


_SOME_SYSTEM: Source = MappingProxyType({"system": "SYSTEM"})


class CalibratedCache(LayerCache):
    """A cache whose schedule follows from a calibration: the base of the policies that need one.

    `description` is what the policy is called, and its parameters; the other arguments are those of AudioCache.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        policy: Policy,
        description: Mapping[str, Any],
        reuse: str,
        source: Source,
        calibrated_steps: int | None = None,
    ) -> None:
        described = {**description, "reuse": reuse}
        plan = CalibratedPlan(Path(calibration_dir), policy, described, source, calibrated_steps)
        super().__init__(plan, reuse_by_name(reuse))
        self.require_calibration = plan.require


def require_calibrations(
    accelerator: Accelerator, solver: str | None, num_steps: int | None, guidance_scale: float | None
) -> None:
    """Raises FileNotFoundError where the accelerator, or one of those that it combines, lacks its calibration.

    The model need not be loaded for that. What is None is not known yet.
    """
    for part in getattr(accelerator, "accelerators", (accelerator,)):
        if isinstance(part, CalibratedCache):
            part.require_calibration(solver, num_steps, guidance_scale)


class AudioCache(CalibratedCache):
    """Each layer is recomputed when its calibrated changes add up to `threshold`; 0 computes always.

    Args:
        calibration_dir: holds `<solver>_<steps>.json` and `.safetensors`, as scripts/calibrate.py writes them.
        reuse: "hold" or "taylor", see `foley.accel.caching.layer_cache`.
        calibrated_steps: take the calibration of that many steps, and read its cumulative curves at this run's steps.
        source: as `CalibratedPlan` takes it.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        threshold: float = 0.3,
        reuse: str = "hold",
        calibrated_steps: int | None = None,
        source: Source = _SOME_SYSTEM,
    ) -> None:
        def policy(calibration: Calibration) -> dict[str, list[bool]]:
            return audiocache_schedule(calibration.changes(), threshold)

        description = {"name": "audiocache", "threshold": threshold}
        super().__init__(calibration_dir, policy, description, reuse, source, calibrated_steps)


class SmoothCache(CalibratedCache):
    """All layers of a kind share one schedule, which looks ahead while the mean error is at most `alpha`.

    Args:
        calibration_dir, reuse, calibrated_steps, source: as for AudioCache.
        max_lookahead: the largest number of evaluations in a row that reuse one output.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        alpha: float,
        max_lookahead: int = 3,
        reuse: str = "hold",
        calibrated_steps: int | None = None,
        source: Source = _SOME_SYSTEM,
    ) -> None:
        def policy(calibration: Calibration) -> dict[str, list[bool]]:
            errors, num_evaluations = calibration.errors(max_lookahead), calibration.signature.num_evaluations
            by_kind = smoothcache_schedule(errors, alpha, num_evaluations)
            return {name: by_kind[layer_kind(name)] for name in calibration.layer_names}

        description = {"name": "smoothcache", "alpha": alpha, "max_lookahead": max_lookahead}
        super().__init__(calibration_dir, policy, description, reuse, source, calibrated_steps)


class Budget(CalibratedCache):
    """The schedule of least summed change whose multiply-accumulates are those of `target_speedup`.

    Args:
        calibration_dir, reuse, calibrated_steps, source: as for AudioCache.
        method: "dynamic" or "greedy", see `foley.accel.caching.policies`.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        target_speedup: float,
        method: str = "dynamic",
        reuse: str = "hold",
        calibrated_steps: int | None = None,
        source: Source = _SOME_SYSTEM,
    ) -> None:
        def policy(calibration: Calibration) -> dict[str, list[bool]]:
            macs = calibration.macs
            return budget_schedule(calibration.changes(), macs.layers, macs.total, target_speedup, method)

        description = {"name": "budget", "target_speedup": target_speedup, "method": method}
        super().__init__(calibration_dir, policy, description, reuse, source, calibrated_steps)


class Fora(LayerCache):
    """Every layer computes at every `interval`-th evaluation and is reused in between."""

    def __init__(self, interval: int, reuse: str = "hold") -> None:
        super().__init__(IntervalPlan(interval), reuse_by_name(reuse))
