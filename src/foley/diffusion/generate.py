"""From prompts' features and seeds to latents: the one way in which anything here is generated."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EvaluationGrid, KnownLatent
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import Progress, Start, sample
from foley.diffusion.solver import Solver
from foley.diffusion.types import Accelerator
from foley.diffusion.windows import Windows
from foley.seeding import torch_generator


def embed(text: Callable[[list[str]], Any], prompts: Sequence[str]) -> Conditioning:
    """What `text`, which returns `embeddings [B, S, Dc]` and their `mask [B, S]`, makes of `prompts`."""
    embedding = text(list(prompts))
    return Conditioning(embedding.embeddings, embedding.mask)


@torch.no_grad()
def generate_latents(
    denoiser: Any,
    process: DiffusionProcess,
    positive: Conditioning,
    negative: Conditioning | None,
    seeds: Sequence[int],
    num_frames: int,
    guidance: ClassifierFreeGuidance,
    solver: Solver,
    accelerator: Accelerator | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = iter,
    known: KnownLatent | None = None,
    start: Start | None = None,
    windows: Windows | None = None,
) -> Tensor:
    """Latents `[B, C, num_frames]`, one per seed and row of `positive`; an item ignores the rest of its batch.

    Args:
        denoiser: a module that has `latent_channels`, and is called as `ClassifierFreeGuidance.wrap` says.
        negative: one row in all or one per item; None only where guidance does not need it.
        accelerator: attached to the denoiser for the length of the run.
        device: where the denoiser is. Noise is drawn on the CPU, so that a seed means the same everywhere.
        progress: wraps the range of evaluations.
        known: frames that the denoiser sees and that come back as given, on `device`.
        start: a latent to begin at instead of pure noise, on `device`.
        windows: cuts a latent longer than the denoiser knows into such as it does.

    Raises ValueError where the solver does not fit the process.
    """
    scheduler = solver.build(process)
    shape = (denoiser.latent_channels, num_frames)
    noise = torch.stack([torch.randn(shape, generator=torch_generator("initial noise", seed)) for seed in seeds])
    generators = [torch_generator("solver noise", seed) for seed in seeds]
    run = solver.run_context(scheduler, guidance, len(seeds))
    grid = EvaluationGrid(scheduler.timesteps.to(device), num_frames, windows)
    denoise = guidance.wrap(denoiser, positive, negative, known, grid)
    with nullcontext() if accelerator is None else accelerator.attach(denoiser):
        callbacks = [] if accelerator is None else [accelerator]
        return sample(denoise, noise.to(device), scheduler, run, callbacks, generators, progress, start, known)
