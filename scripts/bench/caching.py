"""Accelerations without training, beside fewer steps: TMACs, seconds, RTF, the error of the latent, and quality.

Errors are relative L2 distances to the uncached latent from the same noise. They say how far a policy moves a sample,
not whether it sounds worse: that is what the label accuracy, the Frechet distance and the divergence are for, which are
to a reference. Where a solver adds noise on the way, all runs share one path of it, so that fewer steps differ by their
size alone.
"""

import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from foley.accel.caching.budget import budget_schedule, schedule_error
from foley.accel.caching.curves import Calibration
from foley.accel.caching.plots import plot_schedule, plot_tradeoff
from foley.accel.caching.schedule import CacheSchedule
from foley.accel.combined import NoAcceleration
from foley.accel.cost import CostMeter, EvaluationMacs, count_evaluation_macs, tmacs
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import info_path, load_record, save_record, write_json
from foley.core.hashing import hash_module
from foley.core.rates import clip_size
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EvaluationGrid
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.calibrating import calibrate_missing, calibration_prompts
from foley.generation.prompts import LabelledPrompts
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.features import ClipFeatures
from foley.metrics.judge import QUALITIES, Judge
from foley.metrics.latency import Rounds, measure_rounds
from foley.reporting.fewer_steps import FEWER_STEPS, against_fewer_steps
from foley.reporting.tables import provenance
from foley.system.system import load_system, untrained_system

Measured = tuple[Tensor, dict[str, Any]]
"""The latents of a batch, and what they took."""


@dataclass(frozen=True)
class Variant:
    """One setting of one policy, with one kind of reuse where it has any."""

    policy: str
    setting: str
    value: float
    reuse: str | None
    calibrated_steps: int | None = None

    @property
    def name(self) -> str:
        """Fit for a file."""
        parts = (self.policy, self.calibrated_steps and f"from_{self.calibrated_steps}", f"{self.value:g}", self.reuse)
        return "_".join(str(part) for part in parts if part is not None).replace(" ", "_")


@dataclass(frozen=True)
class Workload:
    """Denoising of prompts in batches, apart from text encoding and decoding."""

    pipeline: TextToAudio
    solver: Solver
    guidance: ClassifierFreeGuidance
    prompts: LabelledPrompts
    positive: Conditioning
    negative: Conditioning
    num_frames: int
    duration_seconds: float  # of each clip
    batch_size: int

    @classmethod
    def build(cls, cfg: DictConfig) -> "Workload":
        system = load_system(cfg.system) if cfg.system else untrained_system(cfg)
        pipeline = TextToAudio(system, resolve_device(cfg.device))
        read = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
        prompts = LabelledPrompts(read.captions * cfg.num, read.labels * cfg.num)
        positive, negative = embed(pipeline.text, prompts.captions), embed(pipeline.text, [""])
        _, num_frames = clip_size(cfg.duration_seconds, pipeline.sample_rate_hz, pipeline.codec.hop_samples)
        guidance = instantiate(cfg.guidance, scale=cfg.guidance_scale)
        counts = (cfg.steps, *fewer_steps(cfg)) if "fewer_steps" in cfg.policies else ()
        solver = Solver(cfg.solver.name, cfg.steps, eta=cfg.solver.eta, shared_with=counts)
        sizes = num_frames, cfg.duration_seconds, cfg.batch_size
        return cls(pipeline, solver, guidance, prompts, positive, negative, *sizes)

    @property
    def batches(self) -> list[range]:
        """Numbers of the clips, which are their seeds."""
        count = len(self.prompts.captions)
        return [range(first, min(first + self.batch_size, count)) for first in range(0, count, self.batch_size)]

    def run(self, clips: range, steps: int, accelerator: Accelerator | None = None) -> Tensor:
        """The latents `[B, C, L]` of some of the clips."""
        rows = slice(clips.start, clips.stop)
        latent = generate_latents(
            self.pipeline.denoiser,
            self.pipeline.process,
            Conditioning(self.positive.context[rows], self.positive.mask[rows]),
            self.negative,
            clips,
            self.num_frames,
            self.guidance,
            replace(self.solver, num_steps=steps),
            accelerator,
            self.pipeline.device,
        )
        return latent.cpu()

    @property
    def run_facts(self) -> tuple[str, str, int, float]:
        """Model hash, solver, number of steps and guidance scale: what calibrations are of."""
        return hash_module(self.pipeline.denoiser), self.solver.label, self.solver.num_steps, self.guidance.scale

    @property
    def num_evaluations(self) -> int:
        """NFE of the uncached run."""
        return len(self.solver.build(self.pipeline.process).timesteps)

    def macs(self, duration_seconds: float) -> EvaluationMacs:
        """Of one evaluation of one clip of this length."""
        denoiser, device = self.pipeline.denoiser, self.pipeline.device
        _, frames = clip_size(duration_seconds, self.pipeline.sample_rate_hz, self.pipeline.codec.hop_samples)
        noisy, timestep = torch.zeros(1, denoiser.latent_channels, frames, device=device), torch.ones(1, device=device)
        prompt = Conditioning(self.positive.context[:1], self.positive.mask[:1])
        denoise = self.guidance.wrap(denoiser, prompt, self.negative, grid=EvaluationGrid(timestep, frames))
        return count_evaluation_macs(denoiser, lambda: denoise(noisy, timestep))

    def times(self, measured: Rounds[Variant, Tensor], variant: Variant) -> dict[str, Any]:
        """Seconds, RTF and speed-ups of a variant."""
        audio_seconds = self.duration_seconds * len(self.prompts.captions)
        row = measured.row(variant, UNCACHED, audio_seconds, self.pipeline.device, len(self.batches[0]))
        if self.pipeline.device.type != "cpu":
            return {**row, "processor_seconds": None, "processor_speedup": None}
        own = measured.processor_speedup(variant, UNCACHED)
        return {**row, "processor_seconds": measured.median_processor_seconds(variant), "processor_speedup": own}

    def quality(self, latent: Tensor, judge: Judge) -> dict[str, float | None]:
        """What `judge` says of the decoded clips; nothing where it does not know their sample rate."""
        clips = []
        for rows in self.batches:
            part = latent[rows.start : rows.stop].to(self.pipeline.device)
            audio = self.pipeline.codec.decode(self.pipeline.normaliser.denormalise(part)).cpu()
            labels = self.prompts.labels[rows.start : rows.stop]
            clips.append(judge.clips(audio, self.pipeline.sample_rate_hz, labels))
        known = [batch for batch in clips if batch is not None]
        return judge.assess(ClipFeatures.joined(known)) if known else dict.fromkeys(QUALITIES)


UNCACHED = Variant("uncached", "steps", 0, None)


def fewer_steps(cfg: DictConfig) -> list[int]:
    """The step counts at the speed-ups that are asked for."""
    return [round(cfg.steps / speedup) for speedup in cfg.sweeps.fewer_steps["values"]]


def make_variants(cfg: DictConfig) -> dict[Variant, Accelerator]:
    """What is measured: uncached, and every policy, value of its setting, kind of reuse, and calibration.

    Raises ValueError for a policy that `sweeps` does not hold.
    """
    variants: dict[Variant, Accelerator] = {UNCACHED: NoAcceleration()}
    for policy in cfg.policies:
        if policy == "fewer_steps":
            variants |= {Variant(FEWER_STEPS, "steps", count, None): NoAcceleration() for count in fewer_steps(cfg)}
        else:
            variants |= _swept(cfg, policy)
    return variants


def _swept(cfg: DictConfig, policy: str) -> dict[Variant, Accelerator]:
    sweep = cfg.sweeps.get(policy)
    if sweep is None or "accel" not in sweep:
        raise ValueError(f"policies names {policy!r}, which is none of sweeps: {', '.join(cfg.sweeps)}")
    calibrations = cfg.calibrated_steps if "calibrated_steps" in sweep.accel else [None]
    reuses = sweep.get("reuses", cfg.reuses) if "reuse" in sweep.accel else [None]
    variants: dict[Variant, Accelerator] = {}
    for value, reuse, steps in product(sweep["values"], reuses, calibrations):
        chosen = {"reuse": reuse, "calibrated_steps": steps}
        options = {name: option for name, option in chosen.items() if option is not None}
        variants[Variant(policy, sweep.setting, value, reuse, steps)] = instantiate(
            sweep.accel, **{sweep.setting: value}, **options
        )
    return variants


def calibrate(workload: Workload, accelerators: Collection[Accelerator]) -> None:
    """Make and keep the calibrations that are missing, of captions of the system that are not measured."""
    pipeline, solver, measured = workload.pipeline, workload.solver, set(workload.prompts.captions)
    others = calibration_prompts([caption for caption in pipeline.system.captions if caption not in measured])
    uncached = GenerationSettings(
        solver=solver.name,
        eta=solver.eta,
        guidance=workload.guidance,
        any_guidance_scale=True,
        batch_size=workload.batch_size,
    )
    for accelerator in accelerators:
        calibrate_missing(accelerator, workload.run_facts, others, uncached, pipeline.denoise_clips)


@dataclass(frozen=True)
class Parts:
    """What has been measured, a file for each variant, batch and round: a run that was broken off goes on from them.

    Args:
        facts: of the whole run; parts of another one are made anew.
    """

    directory: Path
    facts: Mapping[str, Any]

    def measure(
        self, workload: Workload, variant: Variant, accelerator: Accelerator, clips: range, number: int
    ) -> Measured:
        """Of round `number`: as kept, or else measured and kept."""
        stem = self.directory / f"{variant.name}-{clips.start}-{number}"
        if info_path(stem).is_file():
            tensors, info = load_record(stem)
            if info.pop("facts") == self.facts:
                return tensors["latent"], info
        latent, info = _measured(workload, variant, accelerator, clips)
        save_record(stem, {"latent": latent}, {**info, "facts": self.facts})
        return latent, info


def _measured(workload: Workload, variant: Variant, accelerator: Accelerator, clips: range) -> Measured:
    steps = int(variant.value) if variant.policy == FEWER_STEPS else workload.solver.num_steps
    meter = CostMeter(accelerator)
    rounds = measure_rounds({"run": partial(workload.run, clips, steps, meter)}, 1, warmup=0)
    schedule, cost = getattr(accelerator, "schedule", None), meter.cost_per_item()
    info = {
        "seconds": rounds.seconds["run"][0],
        "processor_seconds": rounds.processor_seconds["run"][0],
        "macs": None if cost is None else cost.macs_cached * len(clips),
        "computed_fraction": _computed_fraction(accelerator, schedule),
        "reused": {} if schedule is None else _reuses(schedule),
    }
    return rounds.results["run"], info


def _computed_fraction(accelerator: Accelerator, schedule: CacheSchedule | None) -> float | None:
    """Of the layer calls, or of the evaluations where these are skipped as a whole."""
    if schedule is not None:
        return schedule.computed_fraction
    computed = getattr(accelerator, "computed_evaluations", None)
    return fmean(computed) if computed else None


def _reuses(schedule: CacheSchedule) -> dict[str, int]:
    """How often each layer is reused in a run."""
    return dict(zip(schedule.layer_names, (~schedule.compute).sum(dim=0).tolist(), strict=True))


def measure(
    workload: Workload, variants: Mapping[Variant, Accelerator], judge: Judge, repeats: int, parts: Parts
) -> list[dict[str, Any]]:
    """One row per variant, of which the uncached one is the first. Times are medians over rounds."""
    workload.run(workload.batches[0][:1], 2)  # it warms up
    found: dict[Variant, list[list[Measured]]] = {variant: [] for variant in variants}
    for number in range(repeats):
        for variant in variants:
            found[variant].append([])
        for clips in track(workload.batches, description=f"batches, round {number + 1} of {repeats}"):
            for variant, accelerator in variants.items():  # in turns, so that a busy machine is busy for all of them
                found[variant][-1].append(parts.measure(workload, variant, accelerator, clips, number))
    latents = {variant: torch.cat([latent for latent, _ in rounds[-1]]) for variant, rounds in found.items()}
    infos = {variant: [info for _, info in rounds[-1]] for variant, rounds in found.items()}
    measured = Rounds(_seconds(found, "seconds"), _seconds(found, "processor_seconds"), latents)
    return [_row(workload, measured, variant, infos, judge) for variant in variants]


def _seconds(found: Mapping[Variant, list[list[Measured]]], name: str) -> dict[Variant, list[float]]:
    """Of all batches together, in each round."""
    return {
        variant: [sum(info[name] for _, info in batches) for batches in rounds] for variant, rounds in found.items()
    }


def _row(
    workload: Workload,
    measured: Rounds[Variant, Tensor],
    variant: Variant,
    infos: Mapping[Variant, list[dict[str, Any]]],
    judge: Judge,
) -> dict[str, Any]:
    times, latent, reference = workload.times(measured, variant), measured.results[variant], measured.results[UNCACHED]
    macs, plain = (_total(infos[which], "macs") for which in (variant, UNCACHED))
    speedup = plain / macs if macs and plain else None
    fractions = [info["computed_fraction"] for info in infos[variant]]
    return {
        **vars(variant),
        "tmacs": macs and tmacs(macs),
        **times,
        "mac_speedup": speedup,
        "wall_over_mac": speedup and times["wall_speedup"] / speedup,
        "computed_fraction": None if None in fractions else fmean(fractions),
        "reused": infos[variant][0]["reused"],
        "latent_error": ((latent - reference).norm() / reference.norm()).item(),
        "latent_error_median": ((latent - reference).norm(dim=(1, 2)) / reference.norm(dim=(1, 2))).median().item(),
        **workload.quality(latent, judge),
    }


def _total(infos: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """None where it is not known of one of them."""
    values = [info[name] for info in infos]
    return None if None in values else sum(values)


def policy_name(row: Mapping[str, Any]) -> str:
    """Also says of which number of steps the calibration is, where it is another one."""
    steps = row["calibrated_steps"]
    return row["policy"] if steps is None else f"{row['policy']} from {steps}"


def compare_budget_methods(cfg: DictConfig, curves: Calibration) -> list[dict[str, float]]:
    """The summed error of the budget policy's schedules, by dynamic programming and greedily, at each speed-up."""
    changes, macs = curves.changes(), curves.macs
    return [
        {"target_speedup": speedup}
        | {
            method: schedule_error(changes, budget_schedule(changes, macs.layers, macs.total, speedup, method))
            for method in ("dynamic", "greedy")
        }
        for speedup in cfg.sweeps.budget["values"]
    ]


def longer_clips(
    workload: Workload, rows: Sequence[Mapping[str, Any]], durations_seconds: Sequence[float]
) -> list[dict[str, Any]]:
    """The speed-up in MACs of the same reuses in clips of other lengths, of every setting that reuses layers."""
    found = []
    for seconds in durations_seconds:
        macs = workload.macs(seconds)
        for row in rows:
            saved = sum(count * macs.layers[name] for name, count in row["reused"].items())
            plain = macs.total * workload.num_evaluations
            names = {name: row[name] for name in ("policy", "value", "reuse")}
            found.append({**names, "duration_seconds": seconds, "mac_speedup": plain / (plain - saved)})
    return found


def describe_changes(curves: Calibration) -> dict[str, float]:
    """What AudioCache's section III-C observes, as numbers.

    `relative_deviation`: the standard deviation over prompts of a layer's change, over its mean; the median of all
    layers and evaluations. `earliest_half` and `latest_half`: the share of the run after which a block has had half of
    its summed change, of the blocks that are first and last to have it.
    """
    deviation = (curves.std[:, 0, 1:] / curves.mean[:, 0, 1:]).median().item()
    blocks: dict[str, Tensor] = {}
    for name, change in zip(curves.layer_names, curves.mean[:, 0], strict=True):  # [evaluations]
        block = name.rpartition(".")[0]
        blocks[block] = blocks.get(block, 0) + change
    halves = [float((change.cumsum(0) < change.sum() / 2).double().mean()) for change in blocks.values()]
    return {"relative_deviation": deviation, "earliest_half": min(halves), "latest_half": max(halves)}


def load_curves(cfg: DictConfig, workload: Workload) -> Calibration:
    """Those of this solver and number of steps, which the budget policy has read."""
    budget = instantiate(cfg.sweeps.budget.accel)
    wanted = budget.wanted(*workload.run_facts)
    curves: Calibration | None = budget.find(wanted)
    if curves is None:
        raise FileNotFoundError(f"no calibration of {wanted.name}, as policies=[budget] reads it, is kept any more")
    return curves


def describe(cfg: DictConfig, workload: Workload, judge: Judge) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "solver": workload.solver.label,
        "num_steps": cfg.steps,
        "guidance_scale": workload.guidance.scale,
        "duration_seconds": cfg.duration_seconds,
        "frames": workload.num_frames,
        "prompts": len(workload.prompts.captions),
        "batch_size": workload.batch_size,
        "reference_clips": None if judge.reference is None else len(judge.reference),
        "denoiser_width": workload.pipeline.system.configs["denoiser"]["width"],
        "trained_weights": cfg.system is not None,
        "model_hash": workload.pipeline.model_hash,
        "device": str(workload.pipeline.device),
    }


def analyse(cfg: DictConfig, workload: Workload, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What curves and schedules say, beside the rows themselves."""
    layered = [row for row in rows if row["reused"]]
    found: dict[str, Any] = {"longer_clips": longer_clips(workload, layered, cfg.longer_clips_seconds)}
    if "budget" in cfg.policies:
        curves = load_curves(cfg, workload)
        found |= {"budget_methods": compare_budget_methods(cfg, curves), "changes": describe_changes(curves)}
    return found


def draw(rows: Sequence[Mapping[str, Any]], variants: Mapping[Variant, Accelerator], output_dir: Path) -> None:
    """The trade-off, and the schedules that were executed here, each once."""
    plot_tradeoff([{**row, "policy": policy_name(row)} for row in rows], output_dir / "caching.png")
    for variant, accelerator in variants.items():
        schedule = getattr(accelerator, "schedule", None)
        if schedule is not None and variant.reuse in (None, "hold"):  # the others follow the same one
            plot_schedule(schedule, output_dir / "schedules" / f"{replace(variant, reuse=None).name}.png")


@command("bench/caching")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    variants, workload = make_variants(cfg), Workload.build(cfg)
    judge = load_judge(cfg, workload.prompts.labels)
    settings, output_dir = describe(cfg, workload, judge), Path(cfg.output_dir)
    parts = Parts(output_dir / "parts", settings | {"prompts": workload.prompts.captions})
    calibrate(workload, variants.values())
    uncached, *rows = against_fewer_steps(measure(workload, variants, judge, cfg.repeats, parts))
    known = ("tmacs", "seconds", "processor_seconds", "real_time_factor", "machine", "batch_size", *QUALITIES)
    settings |= {f"{name}_uncached": uncached[name] for name in known}
    analysis = analyse(cfg, workload, rows)
    rows = [{name: value for name, value in row.items() if name != "reused"} for row in rows]
    results = {"settings": settings, "provenance": provenance(), "rows": rows, **analysis}
    write_json(output_dir / "caching.json", results)
    draw(rows, variants, output_dir)
    shutil.rmtree(parts.directory)
    sys.stdout.write("\n".join(json.dumps(row) for row in rows) + "\n")


def load_judge(cfg: DictConfig, labels: Collection[str | None]) -> Judge:
    """With the reference clips of the prompts' labels, where there is a reference."""
    if cfg.reference is None:
        return Judge.load(Path(cfg.extractor_dir))
    return Judge.of_recordings(Path(cfg.extractor_dir), cfg.reference, cfg.reference_split, set(labels))


if __name__ == "__main__":
    main()
