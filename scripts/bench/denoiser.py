"""Seconds of one sampling step, plain and with its invariant work hoisted, and of one training step of a denoiser."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foley.accel.precision import compile_blocks, set_precision
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.diffusion.guidance import Conditioning
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.metrics.latency import RealTimeFactor, measure_latency
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
    return {**result, "provenance": provenance()}


@command("bench/denoiser")
def main(cfg: DictConfig) -> None:
    result = measure(cfg)
    write_json(Path(cfg.results_file), result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
