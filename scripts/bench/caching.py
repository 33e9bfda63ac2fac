"""Caching policies: TMACs, seconds, RTF and speed-ups of the denoising, the error of the latent, label accuracy.

Errors are relative L2 distances to the uncached latent from the same noise. They say how far caching moves a sample,
not whether it sounds worse: that is what the label accuracy and the Frechet distance are for.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from foley.accel.caching.budget import budget_schedule, schedule_error
from foley.accel.caching.calibration import Calibration, calibration_stem
from foley.accel.caching.plots import plot_schedule, plot_tradeoff
from foley.accel.cost import EvaluationMacs, count_evaluation_macs, run_cost, tmacs
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.rates import clip_size
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EvaluationGrid
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.prompts import LabelledPrompts
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.metrics.latency import Rounds, measure_rounds
from foley.reporting.tables import provenance
from foley.system.system import load_system, untrained_system


@dataclass(frozen=True)
class Variant:
    """One setting of one policy, with one kind of reuse."""

    policy: str
    setting: str
    value: float
    reuse: str
    calibrated_steps: int | None = None


@dataclass(frozen=True)
class Workload:
    """Denoising of one batch of prompts, apart from text encoding and decoding."""

    pipeline: TextToAudio
    solver: Solver
    guidance: ClassifierFreeGuidance
    labels: list[str | None]
    positive: Conditioning
    negative: Conditioning
    num_frames: int
    audio_seconds: float  # of all clips

    @classmethod
    def build(cls, cfg: DictConfig) -> "Workload":
        system = load_system(cfg.system) if cfg.system else untrained_system(cfg)
        pipeline = TextToAudio(system, resolve_device(cfg.device))
        prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
        positive, negative = embed(pipeline.text, prompts.captions), embed(pipeline.text, [""])
        _, num_frames = clip_size(cfg.duration_seconds, pipeline.sample_rate_hz, pipeline.codec.hop_samples)
        guidance = instantiate(cfg.guidance, scale=cfg.guidance_scale)
        solver = Solver(cfg.solver.name, cfg.steps, eta=cfg.solver.eta)
        audio_seconds = cfg.duration_seconds * len(prompts.captions)
        return cls(pipeline, solver, guidance, prompts.labels, positive, negative, num_frames, audio_seconds)

    def run(self, accelerator: Accelerator | None = None) -> Tensor:
        """The latent `[B, C, L]`."""
        latent = generate_latents(
            self.pipeline.denoiser,
            self.pipeline.process,
            self.positive,
            self.negative,
            range(len(self.positive.mask)),
            self.num_frames,
            self.guidance,
            self.solver,
            accelerator,
            self.pipeline.device,
        )
        return latent.cpu()

    def times(self, measured: Rounds[Variant | None, Tensor], variant: Variant | None) -> dict[str, Any]:
        """Seconds, RTF and speed-up of a variant; None is the uncached denoising."""
        return measured.row(variant, None, self.audio_seconds, self.pipeline.device, len(self.positive.mask))

    @property
    def num_evaluations(self) -> int:
        return len(self.solver.build(self.pipeline.process).timesteps)

    def macs(self) -> EvaluationMacs:
        batch_size, device = len(self.positive.mask), self.pipeline.device
        noisy = torch.zeros(batch_size, self.pipeline.denoiser.latent_channels, self.num_frames, device=device)
        timestep = torch.ones(batch_size, device=device)
        grid = EvaluationGrid(timestep[:1], self.num_frames)
        denoise = self.guidance.wrap(self.pipeline.denoiser, self.positive, self.negative, grid=grid)
        return count_evaluation_macs(self.pipeline.denoiser, lambda: denoise(noisy, timestep))

    def score(self, latent: Tensor, judge: Judge) -> dict[str, float | None]:
        """Label accuracy and Frechet distance of the decoded clips."""
        normaliser, codec = self.pipeline.normaliser, self.pipeline.codec
        audio = codec.decode(normaliser.denormalise(latent.to(self.pipeline.device))).cpu()
        return judge.score(audio, self.pipeline.sample_rate_hz, self.labels)


def make_variants(cfg: DictConfig) -> dict[Variant, Any]:
    """An accelerator for every policy, value of its setting, kind of reuse, and calibration where it has one."""
    variants: dict[Variant, Any] = {}
    for policy in cfg.policies:
        sweep = cfg.sweeps[policy]
        calibrations = cfg.calibrated_steps if "calibrated_steps" in sweep.accel else [None]
        for value, reuse, steps in product(sweep["values"], cfg.reuses, calibrations):
            calibration = {} if steps is None else {"calibrated_steps": steps}
            options = {sweep.setting: value, "reuse": reuse, **calibration}
            variants[Variant(policy, sweep.setting, value, reuse, steps)] = instantiate(sweep.accel, **options)
    return variants


def measure(
    workload: Workload, variants: Mapping[Variant, Any], judge: Judge, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per variant, and what the uncached denoising cost and scores. Times are medians over rounds."""
    macs = workload.macs()  # one evaluation: it warms up
    runs: dict[Variant | None, Callable[[], Tensor]] = {None: workload.run}
    runs |= {variant: partial(workload.run, accelerator) for variant, accelerator in variants.items()}
    measured = measure_rounds(runs, repeats, warmup=0)
    reference = measured.results[None]
    rows = []
    for variant, accelerator in variants.items():
        latent, times = measured.results[variant], workload.times(measured, variant)
        cost = run_cost(accelerator.schedule, macs)
        rows.append(
            {
                **vars(variant),
                "tmacs": tmacs(cost.macs_cached),
                **times,
                "mac_speedup": cost.speedup,
                "wall_over_mac": times["wall_speedup"] / cost.speedup,
                "computed_fraction": accelerator.schedule.computed_fraction,
                "latent_error": ((latent - reference).norm() / reference.norm()).item(),
                **workload.score(latent, judge),
            }
        )
    times, total = workload.times(measured, None), macs.total * workload.num_evaluations
    return rows, {"tmacs": tmacs(total), **times, **workload.score(reference, judge)}


def policy_name(row: Mapping[str, Any]) -> str:
    """Also says of which number of steps the calibration is, where it is another one."""
    steps = row["calibrated_steps"]
    return row["policy"] if steps is None else f"{row['policy']} from {steps}"


def compare_budget_methods(cfg: DictConfig, solver: Solver) -> list[dict[str, float]]:
    """The summed error of the budget policy's schedules, by dynamic programming and greedily, at each speed-up."""
    directory = instantiate(cfg.sweeps.budget.accel.calibration_dir)
    calibration = Calibration.load(calibration_stem(directory, solver.label, cfg.steps))
    changes, macs = calibration.changes(), calibration.macs
    return [
        {"target_speedup": speedup}
        | {
            method: schedule_error(changes, budget_schedule(changes, macs.layers, macs.total, speedup, method))
            for method in ("dynamic", "greedy")
        }
        for speedup in cfg.sweeps.budget["values"]
    ]


@command("bench/caching")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    workload = Workload.build(cfg)
    judge = Judge.load(Path(cfg.extractor_dir), cfg.reference)
    variants = make_variants(cfg)
    rows, uncached = measure(workload, variants, judge, cfg.repeats)
    settings = {
        "solver": workload.solver.label,
        "num_steps": cfg.steps,
        "guidance_scale": workload.guidance.scale,
        "duration_seconds": cfg.duration_seconds,
        "frames": workload.num_frames,
        "prompts": len(workload.positive.mask),
        **{f"{name}_uncached": value for name, value in uncached.items()},
        "denoiser_width": workload.pipeline.system.configs["denoiser"]["width"],
        "trained_weights": cfg.system is not None,
        "model_hash": workload.pipeline.model_hash,
        "device": str(workload.pipeline.device),
    }
    output_dir = Path(cfg.output_dir)
    methods = {"budget_methods": compare_budget_methods(cfg, workload.solver)} if "budget" in cfg.policies else {}
    write_json(output_dir / "caching.json", {"settings": settings, "provenance": provenance(), "rows": rows, **methods})
    plot_tradeoff([{**row, "policy": policy_name(row)} for row in rows], output_dir / "caching.png")
    for variant, accelerator in variants.items():
        if variant.reuse == cfg.reuses[0]:  # the others follow the same schedule
            name = f"{policy_name(vars(variant))}_{variant.value:g}".replace(" ", "_")
            plot_schedule(accelerator.schedule, output_dir / "schedules" / f"{name}.png")
    sys.stdout.write("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
