"""Clips of a system in 8 bits, with and without reuse: error of the latent to the exact one, label accuracy, seconds.

Errors are relative L2 distances to the latent of exact weights without reuse, from the same noise.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from foley.accel.precision import computing_in
from foley.accel.quantisation import weight_bytes
from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.rates import clip_size
from foley.diffusion.context import Accelerator
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.prompts import LabelledPrompts
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.metrics.latency import measure_rounds
from foley.reporting.tables import provenance


def open_system(cfg: DictConfig, kind: str | None) -> TextToAudio:
    """The system, its linear layers in `kind`; None leaves them exact."""
    generator = TextToAudio.load(cfg.system, resolve_device(cfg.device))
    generator.optimise(cfg.precision, quantised=kind)
    return generator


def denoise(cfg: DictConfig, generator: TextToAudio, captions: list[str], accelerator: Accelerator) -> Tensor:
    """Latents `[B, C, L]`, the text encoded anew."""
    _, num_frames = clip_size(cfg.duration_seconds, generator.sample_rate_hz, generator.codec.hop_samples)
    guidance = instantiate(cfg.guidance, scale=cfg.guidance_scale)
    solver = Solver(cfg.solver.name, cfg.steps, eta=cfg.solver.eta)
    with computing_in(generator.inference["precision"], generator.device):
        texts = embed(generator.text, captions), embed(generator.text, [""])
        return generate_latents(
            generator.denoiser,
            generator.process,
            *texts,
            seeds=range(len(captions)),
            num_frames=num_frames,
            guidance=guidance,
            solver=solver,
            accelerator=accelerator,
            device=generator.device,
        ).cpu()


def score(generator: TextToAudio, latent: Tensor, judge: Judge, labels: list[str | None]) -> dict[str, float | None]:
    """Label accuracy, and with a reference the Frechet distance, of the decoded clips."""
    audio = generator.codec.decode(generator.normaliser.denormalise(latent.to(generator.device))).cpu()
    return judge.score(audio, generator.sample_rate_hz, labels)


@command("bench/quantisation")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
    judge = Judge.load(Path(cfg.extractor_dir), cfg.reference)
    systems = {kind or "exact": open_system(cfg, kind) for kind in (None, *cfg.kinds)}
    calls = {
        (kind, name): partial(denoise, cfg, generator, prompts.captions, accelerator)
        for kind, generator in systems.items()
        for name, accelerator in instantiate(cfg.accelerators).items()
    }
    measured, exact = measure_rounds(calls, cfg.repeats, warmup=0), ("exact", "none")
    reference, rows = measured.results[exact].flatten(1), []
    for (kind, name), latent in measured.results.items():
        row: dict[str, Any] = {"quantise": kind, "accelerator": name}
        row["error"] = ((latent.flatten(1) - reference).norm(dim=1) / reference.norm(dim=1)).mean().item()
        row |= score(systems[kind], latent, judge, prompts.labels)
        row |= {"seconds": measured.median_seconds((kind, name)), "speedup": measured.speedup((kind, name), exact)}
        rows.append({**row, "denoiser_mib": weight_bytes(systems[kind].denoiser) / 2**20})
    settings = {"prompts": len(prompts.captions), "steps": cfg.steps, "guidance_scale": cfg.guidance_scale}
    write_json(Path(cfg.results_file), {"settings": settings, "rows": rows, "provenance": provenance()})
    sys.stdout.write("\n".join(map(json.dumps, rows)) + "\n")


if __name__ == "__main__":
    main()
