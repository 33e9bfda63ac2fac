"""Our caches against those of diffusers and of cache-dit, and all of them against fewer steps: speed-up, latent error.

Two kinds of models. `system=FOLDER` is a trained one of ours, whose denoiser theirs see as a transformer of diffusers
(`foley.accel.diffusers.as_transformer`), with the same weights and the same numbers. Without it, it is a
`StableAudioDiTModel`: random weights show that everything runs and what a reused layer saves, but their errors say
little of a trained model's; give `weights=` for that. Each cache is compared with the uncached run of the model that it
is attached to, since ours computes once a generation what hears only time and text.

What is calibrated (AudioCache, SmoothCache, Budget, the ratios of both MagCaches, the polynomial of TeaCache) is so on
the very clips that are measured.
"""

import copy
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import CacheMixin, CosineDPMSolverMultistepScheduler, StableAudioDiTModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTBlock
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import foley.accel
from foley.accel.caching.calibration import CalibrationRecorder, calibration_stem
from foley.accel.caching.layer_cache import LayerCache
from foley.accel.caching.magcache import MagCache
from foley.accel.caching.teacache import DEGREE, TeaCacheRecorder
from foley.accel.cost import EvaluationMacs, count_macs, run_cost, tmacs
from foley.accel.diffusers.as_transformer import LAYERS, AsTransformer
from foley.accel.diffusers.pipelines import accelerated
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.core.rates import clip_size
from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.prompts import LabelledPrompts
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.latency import measure_rounds
from foley.reporting.fewer_steps import FEWER_STEPS, against_fewer_steps
from foley.reporting.matched_error import lines, match
from foley.reporting.tables import Row, provenance
from foley.system.system import load_system

Around = Callable[[float], AbstractContextManager[Any]]
"""Entered around each evaluation, with its timestep."""

LATENT_FRAMES_PER_SECOND = 44100 / 2048  # Stable Audio Open's
OURS, THEIRS = "uncached", "uncached, as theirs see it"
_log = get_logger(__name__)


def undisturbed(timestep: float) -> AbstractContextManager[None]:
    """Nothing happens around an evaluation."""
    return nullcontext()


class CacheableStableAudio(StableAudioDiTModel, CacheMixin):  # type: ignore[misc]
    """The same model with diffusers' `enable_cache`, which it was published without."""


@dataclass(frozen=True)
class StableAudio:
    """Denoising of one clip as `StableAudioPipeline` does it, on random conditioning."""

    model: Any
    steps: int
    guidance_scale: float
    seed: int
    text_tokens: int
    accelerator: Accelerator | None = None
    timestep_scale: float = 1000.0  # its times end at one
    layers: str = r"transformer_blocks\.\d+\.(attn1|attn2|ff)"
    batch_size: int = 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def audio_seconds(self) -> float:
        """Of the clip that a latent of this model decodes to."""
        return float(self.model.config.sample_size / LATENT_FRAMES_PER_SECOND)

    def in_steps(self, steps: int) -> "StableAudio":
        """The same clip by the same solver, in another number of steps."""
        return replace(self, steps=steps)

    def for_theirs(self) -> "StableAudio":
        """The same clip by a copy of the model: hooks of diffusers leave their wrappers behind."""
        return replace(self, model=copy.deepcopy(self.model))

    def noise_shares(self) -> list[float]:
        """sigma / (alpha + sigma) at each evaluation: where it lies between the clean latent (0) and noise (1)."""
        scheduler: Any = CosineDPMSolverMultistepScheduler()
        scheduler.set_timesteps(self.steps)
        return [sigma / (1 + sigma) for sigma in scheduler.sigmas[:-1].tolist()]  # alpha is 1, and the last is 0

    @torch.no_grad()
    def run(self, at_timestep: Around = undisturbed) -> Tensor:
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


class Called(nn.Module):
    """A transformer of diffusers, called as denoisers of ours are."""

    def __init__(self, model: AsTransformer, around: Around) -> None:
        super().__init__()
        self.model, self.around, self.latent_channels = model, around, model.latent_channels

    def forward(self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        with self.around(timestep[0].item()):
            prediction: Tensor = self.model(noisy, timestep, context, context_mask, return_dict=False)[0]
        return prediction


@dataclass(frozen=True)
class TrainedSystem:
    """Clips of a system of ours, as `TextToAudio` denoises them: one batch. Its methods are those of `StableAudio`."""

    model: Any  # the denoiser, or that as a transformer of diffusers
    process: DiffusionProcess
    positive: Conditioning
    negative: Conditioning
    num_frames: int
    solver: Solver
    guidance: ClassifierFreeGuidance
    audio_seconds: float
    timestep_scale: float = 1.0
    layers: str = rf"transformer_blocks\.\d+\.block\.({'|'.join(LAYERS)})"

    @classmethod
    def build(cls, cfg: DictConfig) -> "TrainedSystem":
        pipeline = TextToAudio(load_system(cfg.system), resolve_device(cfg.device))
        captions = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts).captions
        positive, negative = embed(pipeline.text, captions), embed(pipeline.text, [""])
        _, num_frames = clip_size(cfg.duration_seconds, pipeline.sample_rate_hz, pipeline.codec.hop_samples)
        solver, guidance = Solver(cfg.solver, cfg.steps), ClassifierFreeGuidance(cfg.guidance_scale)
        seconds = cfg.duration_seconds * len(captions)
        return cls(pipeline.denoiser, pipeline.process, positive, negative, num_frames, solver, guidance, seconds)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def batch_size(self) -> int:
        return len(self.positive.mask)

    def run(self, at_timestep: Around = undisturbed) -> Tensor:
        denoiser = Called(self.model, at_timestep) if isinstance(self.model, AsTransformer) else self.model
        return self._generate(denoiser)

    def accelerated(self, accelerator: Accelerator) -> Tensor:
        return self._generate(self.model, accelerator)

    def _generate(self, denoiser: nn.Module, accelerator: Accelerator | None = None) -> Tensor:
        what = self.process, self.positive, self.negative, range(self.batch_size), self.num_frames
        how = self.guidance, self.solver, accelerator, self.device
        return generate_latents(denoiser, *what, *how).cpu()

    def in_steps(self, steps: int) -> "TrainedSystem":
        return replace(self, solver=Solver(self.solver.name, steps))

    def for_theirs(self) -> "TrainedSystem":
        return replace(self, model=AsTransformer(self.model))

    def noise_shares(self) -> list[float]:
        run = self.solver.run_context(self.solver.build(self.process), self.guidance, self.batch_size, self.process)
        assert run.log_snr is not None
        return [float(share) for share in torch.sigmoid(-run.log_snr.double() / 2)]  # sigma / alpha is e^(-log_snr / 2)


Workload = StableAudio | TrainedSystem


@dataclass(frozen=True)
class Setting:
    """One cache with one value of its parameter; `run` gives the latent."""

    description: Row
    run: Callable[[], Tensor]
    baseline: str = OURS
    cache: LayerCache | None = None

    def macs(self, uncached: int, evaluation: EvaluationMacs) -> int:
        """Of a run: by our schedule where there is one, and else as counted in a run of its own."""
        if self.cache is None or self.cache.schedule is None:
            return count_macs(self.run)
        cost = run_cost(self.cache.schedule, evaluation)
        return uncached - (cost.macs_uncached - cost.macs_cached)


def our_settings(workload: Workload, cfg: DictConfig, calibrated: Mapping[str, Any]) -> Iterator[Setting]:
    """Every cache, with every kind of reuse where it has kinds, and what was calibrated where it wants that."""
    for name, parameters in cfg.ours.items():
        kind = getattr(foley.accel, name)
        wanted = inspect.signature(kind).parameters
        own = {key: value for key, value in calibrated.items() if key in wanted}
        reuses = cfg.reuse if "reuse" in wanted else [None]
        for reuse, (parameter, value) in product(reuses, _values(parameters)):
            accelerator = kind(**{parameter: value}, **own, **({} if reuse is None else {"reuse": reuse}))
            description = {"of": "foley", "cache": name, "reuse": reuse or "own", "value": value}
            cache = accelerator if isinstance(accelerator, LayerCache) else None
            yield Setting(description, partial(workload.accelerated, accelerator), cache=cache)


def fewer_steps(workload: Workload, cfg: DictConfig) -> Iterator[Setting]:
    """What every cache has to beat: nothing is reused, and the solver takes fewer steps."""
    for steps in cfg.fewer_steps:
        description = {"of": FEWER_STEPS, "cache": FEWER_STEPS, "reuse": "own", "value": steps}
        yield Setting(description, workload.in_steps(steps).run)


def their_settings(workload: Workload, cfg: DictConfig, ratios: Sequence[float]) -> Iterator[Setting]:
    """Each cache of diffusers and of cache-dit, on a model that they understand, at all timesteps."""
    for name, parameters in cfg.theirs.items():
        for parameter, value in _values(parameters):
            description = {"of": "diffusers", "cache": name, "reuse": "own", "value": value}
            yield Setting(description, partial(hooked_run, workload, name, {parameter: value}, ratios), THEIRS)
    for name, options in cfg.cache_dit.items() if has_cache_dit() else ():
        for threshold in options.thresholds:
            description = {"of": "cache-dit", "cache": name, "reuse": "own", "value": threshold}
            values = {**options.config, "residual_diff_threshold": threshold}
            yield Setting(description, partial(cache_dit_run, workload, values, options.taylor_order), THEIRS)


def fresh(model: Any) -> Any:
    """The same weights in modules of their own: what one cache leaves behind would disturb the next."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def has_cache_dit() -> bool:
    """Whether the optional extra is there; says so where it is not."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "WARNING")  # it reports at length whenever it is attached
    try:
        import_module("cache_dit")
    except ModuleNotFoundError:
        _log.warning("cache-dit is not installed, and its caches are left out: pip install 'foley[compare]'")
        return False
    return True


def _values(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for parameter, values in parameters.items():
        for value in values:
            yield parameter, value


def hooked_run(workload: Workload, name: str, values: Mapping[str, Any], ratios: Sequence[float]) -> Tensor:
    """The latents under a cache of diffusers, which is taken off again."""
    shares, evaluations, timestep = workload.noise_shares(), count(), [0.0]

    @contextmanager
    def at_timestep(value: float) -> Iterator[None]:
        timestep[0] = workload.timestep_scale * value  # their ranges count to 1000
        evaluation = next(evaluations)
        place = {"step_index": evaluation, "sigma": shares[evaluation], "num_inference_steps": len(shares)}
        with workload.model.cache_context("joint", **place):
            yield

    workload = replace(workload, model=fresh(workload.model))
    options = _options(name, values, timestep, workload.layers, ratios)
    workload.model.enable_cache(getattr(diffusers, f"{name}Config")(**values, **options))
    try:
        return workload.run(at_timestep)
    finally:
        workload.model.disable_cache()


def _options(name: str, values: Mapping[str, Any], timestep: list[float], layers: str, ratios: Sequence[float]) -> Row:
    """What each needs to know of this model, and what makes it comparable."""
    everywhere, now = (-1, 1001), {"current_timestep_callback": lambda: timestep[0]}
    spatial = values.get("spatial_attention_block_skip_range")
    ranges = dict.fromkeys(("spatial_attention_timestep_skip_range", "cross_attention_timestep_skip_range"), everywhere)
    options: dict[str, Row] = {
        "PyramidAttentionBroadcast": {"cross_attention_block_skip_range": spatial, **ranges, **now},
        # Its reuse of the guidance branch takes two- and three-dimensional latents only, and of attention, it would
        # reuse the first evaluation's (at 998.73 or 999) before it is there.
        "FasterCache": {
            "is_guidance_distilled": True, "spatial_attention_timestep_skip_range": (-1, 998.7), **now
        },
        "TaylorSeerCache": {"cache_identifiers": [layers], "taylor_factors_dtype": torch.float32},
        "MagCache": {"mag_ratios": list(ratios), "num_inference_steps": len(ratios)},
        "SeaCache": {"raw_vision_callback": _as_video},
    }  # fmt: skip
    return options.get(name, {})


def _as_video(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The noisy latents of a call, `[B, C, L]`, as SeaCache filters them: `[C, T, H, W]` each, of one pixel."""
    noisy: Tensor = args[0] if args else kwargs["hidden_states"]
    return [latent[:, :, None, None] for latent in noisy]


def cache_dit_run(workload: Workload, values: Mapping[str, Any], taylor_order: int) -> Tensor:
    """The latents under cache-dit's DBCache, which is taken off again; with an order, it extrapolates the residual."""
    cache_dit: Any = import_module("cache_dit")
    model = fresh(workload.model)
    workload = replace(workload, model=model)
    pattern = cache_dit.ForwardPattern.Pattern_3  # hidden states in, and out
    blocks = cache_dit.BlockAdapter(transformer=model, blocks=model.transformer_blocks, forward_pattern=pattern)
    steps = len(workload.noise_shares())
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor_order) if taylor_order else None
    config = cache_dit.DBCacheConfig(**values, num_inference_steps=steps)
    cache_dit.enable_cache(blocks, cache_config=config, calibrator_config=calibrator)
    try:
        return workload.run()
    finally:
        cache_dit.disable_cache(model)


def build_model(cfg: DictConfig) -> Any:
    """Random, or as published; diffusers is told what its hooks want to know of the block."""
    TransformerBlockRegistry.register(StableAudioDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
    torch.manual_seed(cfg.seed)
    build = CacheableStableAudio.from_pretrained if cfg.weights else CacheableStableAudio
    model: Any = build(cfg.weights) if cfg.weights else build(**cfg.model)
    return model.eval().to(resolve_device(cfg.device))


def build_workload(cfg: DictConfig) -> Workload:
    """Of a system of ours, or else of Stable Audio's transformer."""
    if cfg.system:
        return TrainedSystem.build(cfg)
    return StableAudio(build_model(cfg), cfg.steps, cfg.guidance_scale, cfg.seed, cfg.text_tokens)


def calibrate(workload: Workload, directory: Path, steps: int) -> tuple[dict[str, Any], EvaluationMacs]:
    """What the caches want to know beforehand, by their options, from uncached runs; and the cost of an evaluation."""
    recorder, magnitudes, changes = CalibrationRecorder(), MagCache(), TeaCacheRecorder()
    for accelerator in (recorder, magnitudes, changes):
        workload.accelerated(accelerator)
    calibration = recorder.calibration()
    calibration.save(calibration_stem(directory, calibration.signature.solver, steps))
    (ratios,) = magnitudes.measured.values()
    coefficients = changes.coefficients() if len(changes.pairs) > DEGREE else None
    return {"calibration_dir": directory, "ratios": ratios, "coefficients": coefficients}, calibration.macs


def measure(
    workload: Workload, theirs: Workload, settings: list[Setting], evaluation: EvaluationMacs, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Row]]:
    """One row per setting, and what the uncached denoising of each baseline cost; times are medians over rounds."""
    baselines: dict[str, Callable[[], Tensor]] = {OURS: workload.run, THEIRS: theirs.run}
    runs: dict[Any, Callable[[], Tensor]] = {**baselines, **dict(enumerate(s.run for s in settings))}
    measured = measure_rounds(runs, repeats, warmup=0)
    uncached = {name: count_macs(run) for name, run in baselines.items()}

    def row(name: str | int, baseline: str, macs: int) -> Row:
        latent, reference = measured.results[name], measured.results[OURS]
        return {
            "tmacs": tmacs(macs),
            **measured.row(name, baseline, workload.audio_seconds, workload.device, workload.batch_size),
            "mac_speedup": uncached[baseline] / macs,
            "latent_error": ((latent - reference).norm() / reference.norm()).item(),
        }

    rows = [
        {
            **setting.description,
            "policy": setting.description["cache"],
            **row(index, setting.baseline, setting.macs(uncached[OURS], evaluation)),
        }
        for index, setting in enumerate(settings)
    ]
    return against_fewer_steps(rows), {name: row(name, name, uncached[name]) for name in baselines}


STYLES = {FEWER_STEPS: "ks-", "foley": "o-", "diffusers": "x--", "cache-dit": "+:"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Latent error against speed-up, a line for each cache; what has no error at all is left out."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for of, style in STYLES.items():
        for (cache, reuse), line in lines(rows, of).items():
            points = sorted((row["wall_speedup"], row["latent_error"]) for row in line if row["latent_error"] > 0)
            label = cache if reuse == "own" else f"{cache} {reuse}"
            axes.plot(*zip(*points, strict=True) if points else ([], []), style, label=label)
    axes.set(xlabel="wall-clock speed-up", ylabel="relative L2 distance to the uncached latent", yscale="log")
    title = "circles: ours; crosses: diffusers'; plus: cache-dit's"
    figure.legend(frameon=False, fontsize=6, title=title, title_fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=150)


@command("bench/diffusers_caching")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    directory, workload = Path(cfg.output_dir), build_workload(cfg)
    theirs = workload.for_theirs()
    with TemporaryDirectory() as calibration_dir:
        calibrated, evaluation = calibrate(workload, Path(calibration_dir), cfg.steps)
        settings = [
            *fewer_steps(workload, cfg),
            *our_settings(workload, cfg, calibrated),
            *their_settings(theirs, cfg, calibrated["ratios"]),
        ]
        rows, uncached = measure(workload, theirs, settings, evaluation, cfg.repeats)
    facts = {
        **model_facts(cfg, workload),
        "model_hash": hash_module(workload.model),
        "steps": cfg.steps,
        "guidance_scale": cfg.guidance_scale,
        "diffusers": diffusers.__version__,
        "device": str(workload.device),
        **{f"{name}_uncached": value for name, value in uncached[OURS].items()},
        "as_theirs_see_it": uncached[THEIRS],
    }
    result = {"settings": facts, "provenance": provenance(), "rows": rows, "matched": match(rows)}
    write_json(directory / "diffusers_caching.json", result)
    plot(rows, directory / "diffusers_caching.png")
    sys.stdout.write("\n".join(json.dumps(row) for row in rows) + "\n")


def model_facts(cfg: DictConfig, workload: Workload) -> Row:
    """What was measured."""
    if cfg.system:
        return {
            "weights": str(cfg.system), "solver": cfg.solver, "prompts": workload.batch_size,
            "duration_seconds": cfg.duration_seconds,
        }  # fmt: skip
    return {
        "weights": cfg.weights or "random: the errors say little of a trained model's",
        "model": OmegaConf.to_container(cfg.model) if cfg.weights is None else dict(workload.model.config),
    }


if __name__ == "__main__":
    main()
