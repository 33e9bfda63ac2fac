"""Seconds of one sampling step, plain, hoisted and in 8 bits, and of one training step of a denoiser."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foley.accel.precision import compile_blocks, set_precision
from foley.accel.quantisation import (
    KINDS,
    check_kind,
    quantisable_layers,
    quantise,
    quantise_layers,
    weight_bytes,
)
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.diffusion.guidance import Conditioning
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.metrics.latency import (
    RealTimeFactor,
    measure_latency,
    measure_rounds,
    peak_memory_bytes,
    reset_peak_memory,
)
from foley.models.dit.model import DiffusionTransformer
from foley.reporting.tables import provenance
from foley.training.callbacks.monitoring import activation_bytes


@dataclass(frozen=True)
class Workload:
    """Random inputs of one evaluation: `noisy [B, C, L]`, `timesteps [E]`, `context [B, S, Dc]`."""

    noisy: Tensor
    timesteps: Tensor
    context: Tensor
    repeats: int

    @classmethod
    def build(cls, cfg: DictConfig, denoiser: DiffusionTransformer, context_dim: int) -> "Workload":
        device, size = denoiser.input_projection.weight.device, cfg.batch_size
        scheduler = Solver(cfg.solver.name, cfg.steps).build(instantiate(cfg.process))
        noisy = torch.randn(size, denoiser.latent_channels, cfg.num_frames, device=device)
        context = torch.randn(size, cfg.num_tokens, context_dim, device=device)
        return cls(noisy, scheduler.timesteps.to(device), context, cfg.repeats)

    @property
    def timestep(self) -> Tensor:
        """`[B]`, somewhere in the middle of a run."""
        return self.timesteps[len(self.timesteps) // 2].expand(len(self.noisy))

    def seconds(self, call: Callable[[], object]) -> float:
        """Median over the repeats."""
        return measure_latency(call, self.repeats).median_seconds


@torch.inference_mode()
def sampling_step(denoiser: DiffusionTransformer, work: Workload) -> tuple[dict[str, float], float]:
    """Seconds of a step, plain and hoisted, and of the preparation once a run; and how far hoisting moves the output.

    The last is the largest difference, over the largest output.
    """
    noisy, timestep, context = work.noisy, work.timestep, work.context
    run = denoiser.prepare(work.timesteps, noisy.shape[-1], context)
    plain, hoisted = denoiser(noisy, timestep, context), denoiser(noisy, timestep, run=run)
    difference = ((plain - hoisted).abs().max() / plain.abs().max()).item()
    seconds = {
        "plain": work.seconds(lambda: denoiser(noisy, timestep, context)),
        "hoisted": work.seconds(lambda: denoiser(noisy, timestep, run=run)),
        "preparation_once_a_run": work.seconds(lambda: denoiser.prepare(work.timesteps, noisy.shape[-1], context)),
    }
    return seconds, difference


def variants(denoiser: DiffusionTransformer, device: torch.device, compiled: bool) -> dict[str, DiffusionTransformer]:
    """The denoiser in float32, in bfloat16, and in each kind of 8 bits that `device` computes; compiled ones beside.

    What is not quantised is in float32 on the CPU, and in bfloat16 on CUDA, as in a generation.
    """
    rounded = deepcopy(denoiser)
    set_precision(rounded, "bf16")
    made = {"float32": denoiser, "bfloat16": rounded}
    for kind in KINDS:
        if kind != "fp8" or _has_fp8(device):
            made[kind] = deepcopy(rounded if device.type == "cuda" else denoiser)
            quantise(made[kind], kind)
    if compiled:
        made |= {f"{name}, compiled": deepcopy(model) for name, model in made.items()}
        for name, model in made.items():
            if name.endswith("compiled"):
                compile_blocks(model)
    return made


def _has_fp8(device: torch.device) -> bool:
    try:
        check_kind("fp8", device)
    except ValueError:
        return False
    return True


@torch.inference_mode()
def quantised_steps(models: Mapping[str, DiffusionTransformer], work: Workload) -> dict[str, dict[str, Any]]:
    """Of each of `variants`: seconds of a hoisted step, timed in turns, error to float32, and memory.

    `error` is relative, of the prediction in the 2-norm; `step_mib` what the step needs beyond the weights.
    """
    device, steps = work.noisy.device, {}
    for name, model in models.items():
        run = model.prepare(work.timesteps, work.noisy.shape[-1], work.context)
        steps[name] = partial(model, work.noisy, work.timestep, run=run)
    rounds = measure_rounds(steps, work.repeats)
    exact = rounds.results["float32"]
    rows = {}
    for name, step in steps.items():
        reset_peak_memory(device)
        before = peak_memory_bytes(device)
        step()
        after = peak_memory_bytes(device)
        rows[name] = {
            "seconds": rounds.median_seconds(name),
            **{f"speedup_over_{rival}": rounds.speedup(name, rival) for rival in ("float32", "bfloat16")},
            "error": ((rounds.results[name] - exact).norm() / exact.norm()).item(),
            "weights_mib": weight_bytes(models[name]) / 2**20,
            "step_mib": None if before is None or after is None else (after - before) / 2**20,
        }
    return rows


@torch.inference_mode()
def product_speeds(denoiser: DiffusionTransformer, work: Workload) -> list[dict[str, Any]]:
    """TFLOP/s of one linear layer of each of the blocks' shapes, in float32, bfloat16 and int8: why a step is as it is.

    `rounding_share` is the part of the int8 layer's seconds that is not its product: rounding and scaling.
    """
    device, num_rows = work.noisy.device, work.noisy.shape[0] * work.noisy.shape[-1]
    shapes = sorted({(layer.in_features, layer.out_features) for layer in quantisable_layers(denoiser).values()})
    speeds = []
    for in_features, out_features in shapes:
        exact = nn.Linear(in_features, out_features, device=device)
        block = nn.ModuleList([deepcopy(exact)])
        quantise_layers(block, "int8_dynamic")
        rounded: Any = block[0]
        x = torch.randn(num_rows, in_features, device=device)
        calls = {
            "float32": partial(exact, x),
            "bfloat16": partial(deepcopy(exact).bfloat16(), x.bfloat16()),
            "int8": partial(rounded, x),
            "product": partial(rounded.product, 30 * x),
        }
        rounds = measure_rounds(calls, work.repeats)
        seconds = {name: min(rounds.seconds[name]) for name in calls}
        tflop = 2 * num_rows * in_features * out_features / 1e12
        tflops = {f"{name}_tflops": tflop / seconds[name] for name in ("float32", "bfloat16", "int8")}
        share = max(0.0, 1 - seconds["product"] / seconds["int8"])
        speeds.append({"shape": f"{num_rows} x {in_features} x {out_features}", **tflops, "rounding_share": share})
    return speeds


def training_loss(denoiser: DiffusionTransformer, work: Workload, autocast: bool) -> Tensor:
    """Of a forward pass, in float32 or under bfloat16 autocast."""
    with torch.autocast(work.noisy.device.type, torch.bfloat16) if autocast else nullcontext():
        return denoiser(work.noisy, work.timestep, work.context).square().mean()


def measure_training(denoiser: DiffusionTransformer, work: Workload) -> dict[str, dict[str, float]]:
    """Seconds, saved activations and model FLOP/s of forward and backward pass, with and without checkpointing."""
    # The FLOPs of the model itself: what checkpointing computes again does not count (Chowdhery et al. 2022).
    denoiser.gradient_checkpointing = False
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        training_loss(denoiser, work, autocast=False).backward()
    result: dict[str, dict[str, float]] = {}
    for autocast, checkpointing in product((False, True), repeat=2):
        denoiser.gradient_checkpointing = checkpointing

        def forward(autocast: bool = autocast) -> Tensor:
            return training_loss(denoiser, work, autocast)

        def step(forward: Callable[[], Tensor] = forward) -> None:
            forward().backward()
            denoiser.zero_grad(set_to_none=True)

        seconds = work.seconds(step)
        result[f"{'bfloat16' if autocast else 'float32'}{'_checkpointed' if checkpointing else ''}"] = {
            "seconds": seconds,
            "activation_mib": round(activation_bytes(denoiser, forward) / 2**20, 1),
            "model_tflops": counter.get_total_flops() / seconds / 1e12,
        }
    denoiser.gradient_checkpointing = False
    return result


def matmul_peak_tflops(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """What a square matrix product reaches here: the measure for model FLOP/s."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measure_latency(lambda: left @ right, repeats).minimum_seconds / 1e12


def generation_seconds(denoiser: DiffusionTransformer, cfg: DictConfig, work: Workload) -> dict[str, Any]:
    """Seconds to denoise one clip with guidance, and to decode it with a codec of the composed size."""
    device = work.noisy.device
    codec = instantiate(cfg.codec).eval().to(device)
    text = Conditioning(work.context[:1], torch.ones(1, cfg.num_tokens, dtype=torch.bool, device=device))
    solver = Solver(cfg.solver.name, cfg.steps, eta=cfg.solver.eta)
    guidance, process = instantiate(cfg.guidance), instantiate(cfg.process)

    def denoise() -> Tensor:
        return generate_latents(denoiser, process, text, text, [0], cfg.num_frames, guidance, solver, device=device)

    latent = denoise()
    seconds = {"denoise": work.seconds(denoise)}
    with torch.inference_mode():
        seconds["decode"] = work.seconds(lambda: codec.decode(latent))
    audio_seconds = cfg.num_frames * codec.hop_samples / codec.sample_rate_hz
    return {**seconds, **RealTimeFactor.of(sum(seconds.values()), audio_seconds, device).to_json()}


def measure(cfg: DictConfig) -> dict[str, Any]:
    """All that the config asks for."""
    device = resolve_device(cfg.device)
    torch.manual_seed(0)
    with device:
        denoiser = instantiate(cfg.model).eval()
    for parameter in denoiser.parameters():  # nothing may be skipped, or look equal, because it starts at zero
        torch.nn.init.normal_(parameter, std=0.02)
    work = Workload.build(cfg, denoiser, cfg.model.context_dim)
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "shape": {"batch": cfg.batch_size, "frames": cfg.num_frames, "tokens": cfg.num_tokens, "steps": cfg.steps},
    }
    peaks = {
        str(dtype).removeprefix("torch."): matmul_peak_tflops(device, dtype, cfg.matmul_size, cfg.repeats)
        for dtype in (torch.float32, torch.bfloat16)
    }
    result["matmul_peak_tflops"] = peaks
    if cfg.training:
        result["training_step"] = measure_training(denoiser, work)
        for name, entry in result["training_step"].items():
            entry["share_of_matmul_peak"] = entry["model_tflops"] / peaks[name.removesuffix("_checkpointed")]
    if cfg.quantisation:
        result["linear_layers"] = product_speeds(denoiser, work)
        result["quantisation"] = quantised_steps(variants(denoiser, device, cfg.compile), work)
    if cfg.sampling:
        result |= measure_sampling(cfg, denoiser, work)
    return {**result, "provenance": provenance()}


def measure_sampling(cfg: DictConfig, denoiser: DiffusionTransformer, work: Workload) -> dict[str, Any]:
    """Steps in float32, then in bfloat16, in which the denoiser is left; and a whole generation in that."""
    result: dict[str, Any] = {}
    seconds, result["relative_difference_by_hoisting"] = sampling_step(denoiser, work)
    steps = {"float32": seconds}
    set_precision(denoiser, "bf16")
    steps["bfloat16"], _ = sampling_step(denoiser, work)
    if cfg.compile:
        compile_blocks(denoiser)
        steps["bfloat16_compiled"], _ = sampling_step(denoiser, work)
    if cfg.decode:
        result["generation_bfloat16_seconds"] = generation_seconds(denoiser, cfg, work)
    result["sampling_step_seconds"] = steps
    result["speedup_over_plain_float32"] = {
        f"{precision}_{name}": seconds["plain"] / step[name]
        for precision, step in steps.items()
        for name in ("plain", "hoisted")
    }
    return result


@command("bench/denoiser")
def main(cfg: DictConfig) -> None:
    result = measure(cfg)
    write_json(Path(cfg.results_file), result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
