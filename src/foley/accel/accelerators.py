"""The caching accelerators that configs name: a LayerCache whose schedule is decided when the run is known."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from foley.accel.budget import budget_schedule
from foley.accel.cache import LayerCache
from foley.accel.calibration import Calibration
from foley.accel.plans import CalibratedPlan, IntervalPlan, Policy, Source
from foley.accel.policies import audiocache_schedule, layer_kind, smoothcache_schedule
from foley.accel.reuse import reuse_by_name
from foley.diffusion.types import Accelerator

_SOME_CHECKPOINT: Source = MappingProxyType({"ckpt": "CHECKPOINT"})


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
        reuse: "hold" or "taylor", see `foley.accel.reuse`.
        calibrated_steps: take the calibration of that many steps, and read its cumulative curves at this run's steps.
        source: as `CalibratedPlan` takes it.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        threshold: float = 0.3,
        reuse: str = "hold",
        calibrated_steps: int | None = None,
        source: Source = _SOME_CHECKPOINT,
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
        source: Source = _SOME_CHECKPOINT,
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
        method: "dynamic" or "greedy", see `foley.accel.budget`.
    """

    def __init__(
        self,
        calibration_dir: str | Path,
        target_speedup: float,
        method: str = "dynamic",
        reuse: str = "hold",
        calibrated_steps: int | None = None,
        source: Source = _SOME_CHECKPOINT,
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
