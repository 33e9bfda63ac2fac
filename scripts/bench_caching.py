"""AudioCache at each threshold: wall-clock and MAC speed-up of the denoising, and the error of the latent it gives.

Errors are relative L2 distances to the uncached latent from the same noise. They say how far caching moves a sample,
not whether it sounds worse: that is for the metrics.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

import foley.config  # noqa: F401  (registers the resolvers)
from foley.accel.cost import EvaluationMacs, count_evaluation_macs, run_cost
from foley.accel.plots import plot_tradeoff
from foley.checkpoint import write_json
from foley.diffusion.generate import clip_size, embed, generate_latents
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EvaluationGrid
from foley.diffusion.solver import Solver
from foley.diffusion.types import Accelerator
from foley.pipeline import TextToAudio, resolve_device
from foley.prompts import read_prompts


@dataclass(frozen=True)
class Workload:
    """Denoising of one batch of prompts, apart from text encoding and decoding."""

    pipeline: TextToAudio
    solver: Solver
    guidance: ClassifierFreeGuidance
    positive: Conditioning
    negative: Conditioning
    num_frames: int

    @classmethod
    def build(cls, cfg: DictConfig) -> "Workload":
        pipeline = TextToAudio.load(cfg.ckpt, resolve_device(cfg.device))
        prompts = read_prompts(Path(cfg.prompts))[: cfg.num_prompts]
        positive, negative = embed(pipeline.text, prompts), embed(pipeline.text, [""])
        _, num_frames = clip_size(cfg.duration_seconds, pipeline.sample_rate_hz, pipeline.codec.hop_samples)
        guidance = instantiate(cfg.guidance, scale=cfg.guidance_scale)
        return cls(pipeline, Solver(cfg.solver.name, cfg.steps), guidance, positive, negative, num_frames)

    def run(self, accelerator: Accelerator | None = None) -> tuple[Tensor, float]:
        """The latent `[B, C, L]`, and the seconds it took."""
        start = time.perf_counter()
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
        return latent.cpu(), time.perf_counter() - start

    def macs(self) -> EvaluationMacs:
        batch_size, device = len(self.positive.mask), self.pipeline.device
        noisy = torch.zeros(batch_size, self.pipeline.denoiser.latent_channels, self.num_frames, device=device)
        timestep = torch.ones(batch_size, device=device)
        grid = EvaluationGrid(timestep[:1], self.num_frames)
        denoise = self.guidance.wrap(self.pipeline.denoiser, self.positive, self.negative, grid=grid)
        return count_evaluation_macs(self.pipeline.denoiser, lambda: denoise(noisy, timestep))


def measure(workload: Workload, accelerators: Mapping[float, Any], repeats: int) -> list[dict[str, float]]:
    """One row per threshold. Speed-ups are medians over rounds, each against the uncached run of its own round."""
    macs, (reference, _) = workload.macs(), workload.run()
    speedups: dict[float, list[float]] = {threshold: [] for threshold in accelerators}
    errors: dict[float, float] = {}
    for _ in range(repeats):
        uncached_seconds = workload.run()[1]
        for threshold, accelerator in accelerators.items():
            latent, seconds = workload.run(accelerator)
            speedups[threshold].append(uncached_seconds / seconds)
            errors[threshold] = ((latent - reference).norm() / reference.norm()).item()
    return [
        {
            "threshold": threshold,
            "wall_speedup": median(speedups[threshold]),
            "mac_speedup": run_cost(accelerator.schedule, macs).speedup,
            "computed_fraction": accelerator.schedule.computed_fraction,
            "latent_error": errors[threshold],
        }
        for threshold, accelerator in accelerators.items()
    ]


@hydra.main(version_base="1.3", config_path="../configs", config_name="bench_caching")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    workload = Workload.build(cfg)
    accelerators = {threshold: instantiate(cfg.accel, threshold=threshold) for threshold in cfg.thresholds}
    rows = measure(workload, accelerators, cfg.repeats)
    settings = {
        "solver": cfg.solver.name,
        "num_steps": cfg.steps,
        "guidance_scale": workload.guidance.scale,
        "frames": workload.num_frames,
        "prompts": len(workload.positive.mask),
        "model_hash": workload.pipeline.model_hash,
        "torch_threads": torch.get_num_threads(),
        "device": str(workload.pipeline.device),
    }
    write_json(Path(cfg.output_dir) / "caching.json", {"settings": settings, "rows": rows})
    plot_tradeoff(rows, Path(cfg.output_dir) / "caching.png")
    sys.stdout.write("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
