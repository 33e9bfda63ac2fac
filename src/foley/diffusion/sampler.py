"""The one sampling loop: a callable, a scheduler, and callbacks; it never sees a network."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from foley.diffusion.guidance import Denoise
from foley.diffusion.types import RunContext, SamplerCallback, StepContext

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the loop's range to draw a progress bar; `iter` draws none."""


@torch.no_grad()
def sample(
    denoise: Denoise,
    noise: Tensor,
    scheduler: Any,
    run: RunContext,
    callbacks: Sequence[SamplerCallback] = (),
    generators: list[torch.Generator] | None = None,
    progress: Progress = iter,
) -> Tensor:
    """Integrate from `noise` `[B, C, L]` to a clean latent `[B, C, L]`.

    Args:
        denoise: guided prediction from `(noisy [B, C, L], timestep [B])`.
        noise: standard normal.
        scheduler: a `diffusers` scheduler with its timesteps set (see `Solver.build`); used up by this call.
        run: what the callbacks are told about this run.
        callbacks: told of the run and of each evaluation; `on_run_end` follows every `on_run_start`, on error too.
        generators: one per item, for solvers that add noise on the way, so that an item ignores its batch.
        progress: wraps the range of evaluations.
    """
    extras = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    # Schedulers that step in the model's own space (flow) do not define an input scaling.
    scale_input = getattr(scheduler, "scale_model_input", lambda latent, timestep: latent)
    latent = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    # One copy for all evaluations: each would wait for the device. The scheduler keeps its own on the CPU.
    timesteps = scheduler.timesteps.to(noise.device)
    with ExitStack() as stack:
        for callback in callbacks:
            stack.callback(callback.on_run_end)
            callback.on_run_start(run)
        for evaluation in progress(range(run.num_evaluations)):
            timestep = scheduler.timesteps[evaluation]
            context = StepContext(evaluation, timestep, run)
            for callback in callbacks:
                callback.on_evaluation_start(context)
            prediction = denoise(scale_input(latent, timestep), timesteps[evaluation].expand(len(noise)))
            for callback in callbacks:
                callback.on_evaluation_end(context, prediction)
            latent = scheduler.step(prediction, timestep, latent, return_dict=False, **extras)[0]
    return latent
