"""How a cache decides on its schedule once the run is known: from a calibration, or by counting evaluations."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from foley.accel.calibration import Calibration, calibration_stem
from foley.accel.layers import find_cacheable_layers
from foley.accel.policies import fora_schedule
from foley.accel.schedule import CacheSchedule
from foley.accel.signature import RunSignature
from foley.accel.storage import info_path
from foley.diffusion.types import RunContext

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
