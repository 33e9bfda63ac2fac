"""Our caches against those that come with diffusers, on the same `StableAudioDiTModel`: speed-up and latent error.

Random weights (the default) show that everything runs and what a reused layer saves; their curves say little of those
of a trained model, and so do the errors. Give `weights=` for that. MagCache is left out: it needs a calibration of its
own for each model, which diffusers prints and does not store.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import CacheMixin, CosineDPMSolverMultistepScheduler, StableAudioDiTModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTBlock
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import foley.accel
from foley.accel.caching.calibration import CalibrationRecorder, calibration_stem
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.cost import EvaluationMacs, count_macs, run_cost, tmacs
from foley.accel.diffusers.pipelines import accelerated
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator
from foley.metrics.latency import measure_rounds
from foley.reporting.tables import provenance

Row = dict[str, Any]
LATENT_FRAMES_PER_SECOND = 44100 / 2048  # Stable Audio Open's


class CacheableStableAudio(StableAudioDiTModel, CacheMixin):  # type: ignore[misc]
    """The same model with diffusers' `enable_cache`, which it was published without."""


@dataclass(frozen=True)
class Workload:
    """Denoising of one clip as `StableAudioPipeline` does it, on random conditioning."""

    model: Any
    steps: int
    guidance_scale: float
    seed: int
    text_tokens: int
    accelerator: Accelerator | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def run(self, at_timestep: Callable[[float], AbstractContextManager[Any]] = lambda _: nullcontext()) -> Tensor:
        """The latent `[1, C, L]`; `at_timestep(t)` is entered around each evaluation."""
        config: Any = self.model.config
        scheduler: Any = CosineDPMSolverMultistepScheduler()
        inputs = self._conditioning()
        scheduler.set_timesteps(self.steps, device=self.device)
        latent = self._random("noise", 1, config.in_channels, config.sample_size) * scheduler.init_noise_sigma
        solver_noise = torch_generator("solver noise", self.seed)
        with self._scheduler_known(scheduler):
            for timestep in scheduler.timesteps:
                noisy = scheduler.scale_model_input(torch.cat([latent] * 2), timestep)
                with at_timestep(timestep.item()):
                    output = self.model(noisy, timestep.unsqueeze(0), **inputs, return_dict=False)[0]
                negative, positive = output.chunk(2)
                guided = negative + self.guidance_scale * (positive - negative)
                latent = scheduler.step(guided, timestep, latent, generator=solver_noise).prev_sample
        return latent.cpu()

    def accelerated(self, accelerator: Accelerator) -> Tensor:
        """As `run`, under one of our accelerators."""
        return replace(self, accelerator=accelerator).run()

    def _scheduler_known(self, scheduler: Any) -> AbstractContextManager[None]:
        if self.accelerator is None:
            return nullcontext()
        return accelerated(self.model, scheduler, self.guidance_scale, self.accelerator)

    def _conditioning(self) -> dict[str, Any]:
        config: Any = self.model.config
        text = self._random("text", 1, self.text_tokens, config.cross_attention_input_dim)
        seconds = self._random("seconds", 1, 1, config.global_states_input_dim)
        rotary = get_1d_rotary_pos_embed(
            config.attention_head_dim // 2, config.sample_size + 1, use_real=True, repeat_interleave_real=False
        )
        return {
            "encoder_hidden_states": torch.cat([torch.zeros_like(text), text]),
            "global_hidden_states": seconds.repeat(2, 1, 1),
            "rotary_embedding": tuple(table.to(self.device) for table in rotary),
        }

    def _random(self, purpose: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch_generator(purpose, self.seed)).to(self.device)


@dataclass(frozen=True)
class Setting:
    """One cache with one value of its parameter; `run` gives the latent."""

    description: Row
    run: Callable[[], Tensor]
    cache: LayerCache | None = None

    def macs(self, evaluation: EvaluationMacs) -> int:
        """Of a run: from our schedule, once it is known; of diffusers' caches, which have none, in a run of its own."""
        if self.cache is None or self.cache.schedule is None:
            return count_macs(self.run)
        return run_cost(self.cache.schedule, evaluation).macs_cached


def our_settings(workload: Workload, cfg: DictConfig, calibration_dir: Path) -> Iterator[Setting]:
    """Every policy with every kind of reuse."""
    for name, parameters in cfg.ours.items():
        calibration = {} if name == "Fora" else {"calibration_dir": calibration_dir}
        for reuse, (parameter, value) in product(cfg.reuse, _values(parameters)):
            accelerator = getattr(foley.accel, name)(**{parameter: value}, reuse=reuse, **calibration)
            description = {"of": "foley", "cache": name, "reuse": reuse, "value": value}
            yield Setting(description, partial(workload.accelerated, accelerator), accelerator)


def their_settings(workload: Workload, cfg: DictConfig) -> Iterator[Setting]:
    """Each of diffusers' caches, on attention in blocks named as those of this model are, at all timesteps."""
    for name, parameters in cfg.theirs.items():
        for parameter, value in _values(parameters):
            description = {"of": "diffusers", "cache": name, "reuse": "own", "value": value}
            yield Setting(description, partial(hooked_run, workload, name, {parameter: value}))


def _values(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for parameter, values in parameters.items():
        for value in values:
            yield parameter, value


def hooked_run(workload: Workload, name: str, values: Mapping[str, Any]) -> Tensor:
    """The latent under a cache of diffusers, which is taken off again."""
    timestep = [0.0]

    @contextmanager
    def at_timestep(value: float) -> Iterator[None]:
        timestep[0] = 1000 * value  # their ranges count to 1000
        with workload.model.cache_context("joint"):
            yield

    workload.model.enable_cache(getattr(diffusers, f"{name}Config")(**values, **_options(name, values, timestep)))
    try:
        return workload.run(at_timestep)
    finally:
        workload.model.disable_cache()


def _options(name: str, values: Mapping[str, Any], timestep: list[float]) -> Row:
    """What each needs to know of this model, and what makes it comparable."""
    everywhere, now = (-1, 1001), {"current_timestep_callback": lambda: timestep[0]}
    if name == "PyramidAttentionBroadcast":
        ranges = dict.fromkeys(
            ("spatial_attention_timestep_skip_range", "cross_attention_timestep_skip_range"), everywhere
        )
        return {"cross_attention_block_skip_range": values["spatial_attention_block_skip_range"], **ranges, **now}
    if name == "FasterCache":
        # Its reuse of the guidance branch takes two- and three-dimensional latents only, and of attention, it would
        # reuse the first evaluation's (at 998.73) before it is there.
        return {"is_guidance_distilled": True, "spatial_attention_timestep_skip_range": (-1, 998.7), **now}
    if name == "TaylorSeerCache":
        layers = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
        return {"cache_identifiers": layers, "taylor_factors_dtype": torch.float32}
    return {}


def audio_seconds(model: Any) -> float:
    """Of the clip that a latent of this model decodes to."""
    return float(model.config.sample_size / LATENT_FRAMES_PER_SECOND)


def build_model(cfg: DictConfig) -> Any:
    """Random, or as published; diffusers is told what its hooks want to know of the block."""
    TransformerBlockRegistry.register(StableAudioDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
    torch.manual_seed(cfg.seed)
    build = CacheableStableAudio.from_pretrained if cfg.weights else CacheableStableAudio
    model: Any = build(cfg.weights) if cfg.weights else build(**cfg.model)
    return model.eval().to(resolve_device(cfg.device))


def measure(
    workload: Workload, settings: list[Setting], macs: EvaluationMacs, repeats: int, clip_seconds: float
) -> tuple[list[Row], Row]:
    """One row per setting, and what the uncached denoising cost; times are medians over rounds."""
    runs = {index: setting.run for index, setting in enumerate(settings)}
    measured = measure_rounds({None: workload.run, **runs}, repeats, warmup=0)
    reference, uncached, rows = measured.results[None], count_macs(workload.run), []
    for index, setting in enumerate(settings):
        error = (measured.results[index] - reference).norm() / reference.norm()
        cost = setting.macs(macs)
        rows.append(
            {
                **setting.description,
                "tmacs": tmacs(cost),
                **measured.row(index, None, clip_seconds, workload.device),
                "mac_speedup": uncached / cost,
                "latent_error": error.item(),
            }
        )
    return rows, {"tmacs": tmacs(uncached), **measured.row(None, None, clip_seconds, workload.device)}


def speedup_at(error: float, rows: Sequence[Row]) -> float | None:
    """The speed-up of a cache at a latent error, on the straight lines between its settings and "none" (1x, no error).

    Where the lines turn back, the largest; None beyond the cache's largest error.
    """
    points = sorted((row["latent_error"], row["wall_speedup"]) for row in rows)
    if error > points[-1][0]:
        return None
    best = np.maximum.accumulate([1.0, *(speedup for _, speedup in points)])
    return float(np.interp(error, [0.0, *(error for error, _ in points)], best))


def match(rows: list[Row]) -> list[Row]:
    """For each setting of diffusers, which of our caches is the fastest at its error, and how fast."""
    matched = []
    for theirs in (row for row in rows if row["of"] == "diffusers"):
        ours: list[Row] = [
            {"cache": cache, "reuse": reuse, "wall_speedup": speedup}
            for (cache, reuse), line in lines(rows, "foley").items()
            if (speedup := speedup_at(theirs["latent_error"], line)) is not None
        ]
        best = max(ours, key=lambda row: row["wall_speedup"], default=None)
        ratio = None if best is None else best["wall_speedup"] / theirs["wall_speedup"]
        matched.append({"theirs": theirs, "ours": best, "ours_over_theirs": ratio})
    return matched


def lines(rows: Sequence[Row], of: str) -> dict[tuple[str, str], list[Row]]:
    """The rows of each cache and kind of reuse."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["of"] == of:
            found.setdefault((row["cache"], row["reuse"]), []).append(row)
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Latent error against speed-up, a line for each cache; ours with filled markers."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for of, style in (("foley", "o-"), ("diffusers", "x--")):
        for (cache, reuse), line in lines(rows, of).items():
            points = sorted((row["wall_speedup"], row["latent_error"]) for row in line)
            axes.plot(*zip(*points, strict=True), style, label=cache if reuse == "own" else f"{cache} {reuse}")
    axes.set(xlabel="wall-clock speed-up", ylabel="relative L2 distance to the uncached latent")
    axes.legend(frameon=False, fontsize=7, title="filled: ours; crosses: diffusers'", title_fontsize=7)
    figure.savefig(path, dpi=150)


@command("bench/diffusers_caching")
def main(cfg: DictConfig) -> None:
    directory = Path(cfg.output_dir)
    workload = Workload(build_model(cfg), cfg.steps, cfg.guidance_scale, cfg.seed, cfg.text_tokens)
    recorder = CalibrationRecorder()
    workload.accelerated(recorder)
    calibration = recorder.calibration()
    # A copy, for their hooks leave their wrappers behind.
    hooked = replace(workload, model=copy.deepcopy(workload.model))
    with TemporaryDirectory() as calibration_dir:
        calibration.save(calibration_stem(Path(calibration_dir), calibration.signature.solver, cfg.steps))
        settings = [*our_settings(workload, cfg, Path(calibration_dir)), *their_settings(hooked, cfg)]
        rows, uncached = measure(workload, settings, calibration.macs, cfg.repeats, audio_seconds(workload.model))
    facts = {
        "weights": cfg.weights or "random: the errors say little of a trained model's",
        "model": OmegaConf.to_container(cfg.model) if cfg.weights is None else dict(workload.model.config),
        "model_hash": hash_module(workload.model),
        "steps": cfg.steps,
        "guidance_scale": cfg.guidance_scale,
        "diffusers": diffusers.__version__,
        "device": str(workload.device),
        **{f"{name}_uncached": value for name, value in uncached.items()},
    }
    result = {"settings": facts, "provenance": provenance(), "rows": rows, "matched": match(rows)}
    write_json(directory / "diffusers_caching.json", result)
    plot(rows, directory / "diffusers_caching.png")
    sys.stdout.write("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
