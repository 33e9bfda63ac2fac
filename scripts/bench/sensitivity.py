"""Which objective predicts the latent's error: how much layers change, or how far their reuse moves the latent.

Random schedules of one number of computations are run, and their errors compared with what each objective says of them
beforehand, by Spearman's rank correlation. Calibration and evaluation take different prompts and seeds. Then the budget
policy is run by both objectives, beside fewer steps without a cache.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from scipy.stats import spearmanr
from torch import Tensor

from foley.accel.caching.budget import Budget, schedule_error, sensitivity_intervals, summed_error
from foley.accel.caching.calibration import CalibrationRecorder
from foley.accel.caching.curves import Calibration
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.schedule import CacheSchedule
from foley.accel.caching.sensitivity import SensitivityRecorder
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.rates import clip_size
from foley.data.ordering import evenly_spaced
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.prompts import LabelledPrompts
from foley.generation.text_to_audio import TextToAudio
from foley.reporting.tables import provenance

Rows = dict[str, list[bool]]


@dataclass(frozen=True)
class Batch:
    """Denoising of some prompts, always with the same seeds."""

    pipeline: TextToAudio
    captions: list[str]
    first_seed: int
    num_frames: int
    guidance: ClassifierFreeGuidance
    solver: Solver

    def latents(self, accelerator: Accelerator | None = None, num_steps: int | None = None) -> Tensor:
        """`[B, C, L]`."""
        pipeline = self.pipeline
        return generate_latents(
            pipeline.denoiser,
            pipeline.process,
            positive=embed(pipeline.text, self.captions),
            negative=embed(pipeline.text, [""]),
            seeds=range(self.first_seed, self.first_seed + len(self.captions)),
            num_frames=self.num_frames,
            guidance=self.guidance,
            solver=self.solver if num_steps is None else replace(self.solver, num_steps=num_steps),
            accelerator=accelerator,
            device=pipeline.device,
        )

    def calibrate(self, num_probes: int) -> Calibration:
        """Curves of changes and of sensitivity."""
        changes, sensitivity = CalibrationRecorder(), SensitivityRecorder(num_probes=num_probes)
        self.latents(changes)
        sensitivity.on_latent(self.latents(sensitivity))
        return replace(changes.calibration(), sensitivity=sensitivity.sensitivity())


def distance(latent: Tensor, exact: Tensor) -> float:
    """Root mean square over items of the relative L2 distance."""
    moved, length = ((part.flatten(1).norm(dim=1)) for part in (latent - exact, exact))
    return (moved / length).square().mean().sqrt().item()


def random_rows(calibration: Calibration, fraction: float, shared: bool, generator: np.random.Generator) -> Rows:
    """A share `fraction` of all calls, at random; more of them at times and in layers that are drawn as well."""
    names, size = calibration.layer_names, calibration.signature.num_evaluations
    columns = 1 if shared else len(names)
    times = generator.normal(size=(size // 5 + 2, 1)).repeat(5, axis=0)[:size]  # favoured stretches
    scores = times + generator.normal(size=(1, columns)) + generator.normal(size=(size, columns))
    scores[0] = np.inf  # nothing is reused before it is computed
    computed = scores >= np.sort(scores, axis=None)[::-1][round(fraction * scores.size) - 1]
    return {name: computed[:, index % columns].tolist() for index, name in enumerate(names)}


def predictions(calibration: Calibration, rows: Rows, shared: bool) -> dict[str, float]:
    """What each objective says of a schedule."""
    used = (calibration.joint() if shared else calibration).by("sensitivity")
    tables = dict(zip(used.layer_names, used.mean.numpy(), strict=True))
    own = dict.fromkeys(tables, next(iter(rows.values()))) if shared else rows
    found = {"change": schedule_error(calibration.changes(), rows)}
    for objective, coherent in (("sensitivity", True), ("sensitivity, independent", False)):
        intervals = {name: sensitivity_intervals(table, coherent) for name, table in tables.items()}
        found[objective] = summed_error(intervals, own) ** 0.5
    return found


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Correlation of ranks."""
    return float(spearmanr(first, second).statistic)


def correlation(rows: list[dict[str, Any]], objective: str, resamples: int) -> dict[str, float]:
    """Of predicted and measured errors, with an interval of 95 % by drawing schedules again."""
    predicted, measured = (np.array([row[name] for row in rows]) for name in (objective, "latent_error"))
    generator = np.random.default_rng(0)
    draws = (generator.choice(len(rows), len(rows), replace=True) for _ in range(resamples))
    found = [spearman(predicted[draw], measured[draw]) for draw in map(np.unique, draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return {"spearman": spearman(predicted, measured), "low": float(low), "high": float(high)}


def evaluate_random(batch: Batch, calibration: Calibration, exact: Tensor, cfg: DictConfig) -> list[dict[str, Any]]:
    """A row for each schedule: predicted and measured."""
    generator, rows = np.random.default_rng(cfg.seed), []
    for index in range(cfg.num_schedules):
        shared = index % 2 == 1
        decisions = random_rows(calibration, cfg.computed_fraction, shared, generator)
        schedule = CacheSchedule.from_rows(decisions, calibration.kinds, calibration.signature, {"name": "random"})
        error = distance(batch.latents(LayerCache(schedule)), exact)
        rows.append({"shared": shared, **predictions(calibration, decisions, shared), "latent_error": error})
    return rows


def evaluate_policies(
    batch: Batch, calibration: Calibration, exact: Tensor, cfg: DictConfig
) -> Iterator[dict[str, Any]]:
    """The budget policy by each objective, per layer and shared, and fewer steps, at some speed-ups in MACs."""

    def run(speedup: float, name: str, make: Callable[[], Tensor]) -> dict[str, Any]:
        return {"target_speedup": speedup, "policy": name, "latent_error": distance(make(), exact)}

    for speedup in cfg.target_speedups:
        for objective in ("change", "sensitivity"):
            for shared in (False, True):
                cache = Budget(cfg.output_dir, speedup, objective=objective, shared=shared)
                cache.adopt(calibration)
                name = f"budget by {objective}{', shared' * shared}"
                yield run(speedup, name, partial(batch.latents, cache))
        steps = round(cfg.steps / speedup)
        yield run(speedup, "fewer steps", partial(batch.latents, None, steps))


@command("bench/sensitivity")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    pipeline = TextToAudio.load(cfg.system, resolve_device(cfg.device))
    captions = LabelledPrompts.read(Path(cfg.prompts), cfg.calibration_prompts + cfg.num_prompts).captions
    apart = set(evenly_spaced(len(captions), cfg.calibration_prompts))
    _, num_frames = clip_size(cfg.duration_seconds, pipeline.sample_rate_hz, pipeline.codec.hop_samples)
    solver = Solver(cfg.solver.name, cfg.steps, eta=cfg.solver.eta)
    same = num_frames, ClassifierFreeGuidance(cfg.guidance_scale), solver
    learnt, batch = (
        Batch(pipeline, [caption for index, caption in enumerate(captions) if (index in apart) is known], seed, *same)
        for known, seed in ((True, 1000), (False, 0))
    )
    calibration, exact = learnt.calibrate(cfg.num_probes), batch.latents()
    rows = evaluate_random(batch, calibration, exact, cfg)
    families = {"all": rows} | {
        name: [row for row in rows if row["shared"] == shared]
        for name, shared in (("per layer", False), ("shared", True))
    }
    correlations = [
        {"schedules": family, "n": len(chosen), "objective": objective, **correlation(chosen, objective, cfg.resamples)}
        for family, chosen in families.items()
        for objective in ("change", "sensitivity", "sensitivity, independent")
    ]
    policies = list(evaluate_policies(batch, calibration, exact, cfg))
    settings = {
        **{
            name: cfg[name]
            for name in ("steps", "guidance_scale", "duration_seconds", "num_probes", "computed_fraction")
        },
        "solver": solver.label,
        "prompts": len(batch.captions),
        "calibration_prompts": len(learnt.captions),
        "model_hash": pipeline.model_hash,
        "device": str(pipeline.device),
    }
    result = {"settings": settings, "correlations": correlations, "policies": policies, "rows": rows}
    write_json(Path(cfg.output_dir) / "sensitivity.json", {**result, "provenance": provenance()})
    sys.stdout.write("\n".join(json.dumps(row) for row in [*correlations, *policies]) + "\n")


if __name__ == "__main__":
    main()
