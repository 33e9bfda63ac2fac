"""The caching accelerators that configs name: a LayerCache whose schedule is decided when the run is known."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from foley.accel.budget import budget_schedule
from foley.accel.cache import LayerCache
from foley.accel.calibration import Calibration
from foley.accel.layers import find_cacheable_layers
from foley.accel.policies import audiocache_schedule, fora_schedule, layer_kind, smoothcache_schedule
from foley.accel.reuse import reuse_by_name
from foley.accel.schedule import CacheSchedule
from foley.accel.signature import RunSignature
from foley.accel.storage import info_path
from foley.diffusion.types import Accelerator, RunContext

Source = Mapping[str, str | None]
_SOME_CHECKPOINT: Source = MappingProxyType({"ckpt": "CHECKPOINT"})


def calibration_stem(directory: Path, solver: str, num_steps: int | str) -> Path:
    """Where the calibration of one solver and step count lies: `<directory>/<solver>_<steps>`, without extension."""
    return directory / f"{solver}_{num_steps}"


def calibration_directory(checkpoint: str | Path) -> Path:
    """`calibration/` inside a system directory, or beside a checkpoint file."""
    path = Path(checkpoint).expanduser()
    return (path.parent if path.is_file() else path) / "calibration"


class Policy(Protocol):
    """From a calibration of the run's evaluations to one list of decisions per layer."""

    def __call__(self, calibration: Calibration) -> Mapping[str, Sequence[bool]]: ...


@dataclass(frozen=True)
class CalibratedPlan:
    """Reads the calibration for the run's solver and step count, and applies a policy to its curves.

    Args:
        source: the options by which scripts/calibrate.py knows the model, for the message where there is none.
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
