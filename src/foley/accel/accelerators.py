"""The caching accelerators that configs name: a LayerCache whose schedule is decided when the run is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from foley.accel.cache import LayerCache
from foley.accel.calibration import Calibration
from foley.accel.layers import find_cacheable_layers
from foley.accel.policies import audiocache_schedule, fora_schedule, smoothcache_schedule
from foley.accel.schedule import CacheSchedule
from foley.accel.signature import RunSignature
from foley.accel.storage import info_path
from foley.diffusion.types import RunContext


def calibration_stem(directory: Path, solver: str, num_steps: int) -> Path:
    """Where the calibration of one solver and step count lies: `<directory>/<solver>_<steps>`, without extension."""
    return directory / f"{solver}_{num_steps}"


def calibration_directory(checkpoint: str | Path) -> Path:
    """`calibration/` inside a system directory, or beside a checkpoint file."""
    path = Path(checkpoint)
    return (path.parent if path.is_file() else path) / "calibration"


class Policy(Protocol):
    """From change curves to one list of decisions per layer."""

    def __call__(self, calibration: Calibration) -> Mapping[str, Sequence[bool]]: ...


@dataclass(frozen=True)
class CalibratedPlan:
    """Reads the calibration for the run's solver and step count, and applies a policy to its curves."""

    directory: Path
    policy: Policy
    description: Mapping[str, Any]

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """Raises FileNotFoundError if there is no such calibration, SignatureMismatchError if it is another model's."""
        stem = calibration_stem(self.directory, run.solver, run.num_steps)
        if not info_path(stem).is_file():
            system = self.directory.parent
            checkpoint = system if (system / "system.json").is_file() else "CHECKPOINT"
            raise FileNotFoundError(
                f"{info_path(stem)} does not exist: this system is not calibrated for solver {run.solver!r} with "
                f"{run.num_steps} steps. Make it with: python scripts/calibrate.py ckpt={checkpoint} prompts=FILE "
                f"solver={run.solver} steps={run.num_steps} guidance_scale={run.guidance_scale:g} "
                f"output_dir={self.directory}"
            )
        calibration = Calibration.load(stem)
        calibration.signature.require(RunSignature.of(run, denoiser), f"the calibration {stem}")
        rows = self.policy(calibration)
        return CacheSchedule.from_rows(rows, calibration.kinds, calibration.signature, self.description)


@dataclass(frozen=True)
class IntervalPlan:
    """Computes every layer at every `interval`-th evaluation; needs no calibration."""

    interval: int

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        kinds = {layer.name: layer.kind for layer in find_cacheable_layers(denoiser)}
        rows = dict.fromkeys(kinds, fora_schedule(run.num_evaluations, self.interval))
        description = {"name": "fora", "interval": self.interval}
        return CacheSchedule.from_rows(rows, kinds, RunSignature.of(run, denoiser), description)


class AudioCache(LayerCache):
    """Each layer is recomputed when its calibrated changes add up to `threshold`; 0 computes always.

    Args:
        calibration_dir: holds `<solver>_<steps>.json` and `.safetensors`, as scripts/calibrate.py writes them.
    """

    def __init__(self, calibration_dir: str | Path, threshold: float = 0.3) -> None:
        def policy(calibration: Calibration) -> dict[str, list[bool]]:
            return audiocache_schedule(calibration.changes(), threshold)

        description = {"name": "audiocache", "threshold": threshold}
        super().__init__(CalibratedPlan(Path(calibration_dir), policy, description))


class SmoothCache(LayerCache):
    """All layers of a kind share one schedule, which looks ahead while the mean error is at most `alpha`.

    Args:
        calibration_dir: as for AudioCache.
        max_lookahead: the largest number of evaluations in a row that reuse one output.
    """

    def __init__(self, calibration_dir: str | Path, alpha: float, max_lookahead: int = 3) -> None:
        def policy(calibration: Calibration) -> dict[str, list[bool]]:
            errors, kinds = calibration.errors(max_lookahead), calibration.kinds
            by_kind = smoothcache_schedule(errors, kinds, alpha, calibration.signature.num_evaluations)
            return {name: by_kind[kind] for name, kind in kinds.items()}

        description = {"name": "smoothcache", "alpha": alpha, "max_lookahead": max_lookahead}
        super().__init__(CalibratedPlan(Path(calibration_dir), policy, description))


class Fora(LayerCache):
    """Every layer computes at every `interval`-th evaluation and is reused in between."""

    def __init__(self, interval: int) -> None:
        super().__init__(IntervalPlan(interval))
