"""Seconds of one guided step of a denoiser: PyTorch, compiled as one graph, ONNX, and AOTInductor.

Each way is compared with PyTorch in the same round. What it takes to compile or to export is reported beside it.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from foley.accel.compiling import compile_evaluation
from foley.cli.command import command
from foley.core.config import shipped
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, Denoise, EvaluationGrid
from foley.diffusion.solver import Solver
from foley.metrics.latency import measure_latency, measure_rounds
from foley.reporting.tables import provenance
from foley.system.exported import export_graphs, load_graphs
from foley.system.system import System, load_system


def exported(system: System, backend: str, device: torch.device) -> nn.Module:
    """The system's denoiser, exported and read again."""
    with tempfile.TemporaryDirectory() as folder:
        export_graphs(system, Path(folder), backend, only={"denoiser"})
        return load_graphs(Path(folder), system.modules["denoiser"], system.modules["codec"], device).denoiser


def guided_step(way: str, system: System, cfg: DictConfig, inputs: tuple[Tensor, Tensor, Tensor]) -> Denoise:
    """A guided evaluation by one way, made ready but for what its first call does."""
    noisy, positive, negative = inputs
    denoiser = system.modules["denoiser"]
    if way not in ("eager", "compiled"):
        denoiser = exported(system, way, noisy.device)
    mask = torch.ones(positive.shape[:2], dtype=torch.bool, device=noisy.device)
    text = Conditioning(positive, mask), Conditioning(negative, mask)
    timesteps = Solver("ddim", cfg.steps).build(system.process).timesteps.to(noisy.device)
    grid = EvaluationGrid(timesteps, cfg.num_frames)
    denoise = ClassifierFreeGuidance(3.0).wrap(denoiser, text[0], text[1], grid=grid)
    evaluate = compile_evaluation(denoise) if way == "compiled" else denoise
    timestep = timesteps[len(timesteps) // 2].expand(len(noisy))
    return lambda noisy, _: evaluate(noisy, timestep)


@torch.no_grad()
def measure_denoiser(system: System, cfg: DictConfig) -> dict[str, Any]:
    """By way: seconds and speed-up of a step, seconds to be ready for it, and the largest difference to the first."""
    device = resolve_device(cfg.device)
    denoiser: Any = system.modules["denoiser"].eval().to(device)
    text: Any = system.modules["text"]
    noisy = torch.randn(cfg.batch_size, denoiser.latent_channels, cfg.num_frames, device=device)
    positive, negative = torch.randn(2, cfg.batch_size, cfg.num_tokens, text.dim, device=device).unbind()
    steps: dict[str, Callable[[], Tensor]] = {}
    ready = {}
    for way in cfg.ways:

        def make(way: str = way) -> None:
            steps[way] = partial(guided_step(way, system, cfg, (noisy, positive, negative)), noisy, noisy)
            steps[way]()  # what is compiled is compiled now

        ready[way] = measure_latency(make, repeats=1, warmup=0).median_seconds
    measured, first = measure_rounds(steps, cfg.rounds), steps[cfg.ways[0]]()
    return {
        way: {
            "seconds": measured.median_seconds(way),
            "speedup": measured.speedup(way, cfg.ways[0]),
            "seconds_until_ready": ready[way],
            "largest_difference": (step() - first).abs().max().item(),
        }
        for way, step in steps.items()
    }


def measure(cfg: DictConfig) -> dict[str, Any]:
    """All that the config asks for."""
    torch.manual_seed(0)
    demo, denoisers = load_system(shipped("demo")), instantiate(cfg.denoisers)
    systems = {"demo": demo} if cfg.demo else {}
    for name, denoiser in denoisers.items():
        for parameter in denoiser.parameters():  # nothing may be skipped because it starts at zero
            nn.init.normal_(parameter, std=0.02)
        systems[name] = replace(demo, modules={**demo.modules, "denoiser": denoiser})
    shape = {name: cfg[name] for name in ("batch_size", "num_frames", "num_tokens", "device")}
    rows = {name: measure_denoiser(system, cfg) for name, system in systems.items()}
    return {"shape": shape, "guided_step": rows, "provenance": provenance()}


@command("bench/backends")
def main(cfg: DictConfig) -> None:
    result = measure(cfg)
    write_json(Path(cfg.results_file), result)
    sys.stdout.write("".join(f"{json.dumps({name: row})}\n" for name, row in result["guided_step"].items()))


if __name__ == "__main__":
    main()
