"""The loop from noise to a latent, and the generation of a batch of items with it.

The loop knows a callable, a scheduler and callbacks, never a network: this is all of a generation.

>>> process, guidance, solver = DiffusionProcess("v"), ClassifierFreeGuidance(1.0), Solver("ddim", 10)
>>> scheduler = solver.build(process)
>>> run = solver.run_context(scheduler, guidance, batch_size=2)
>>> target, noise = torch.zeros(2, 8, 50), torch.randn(2, 8, 50)
>>> def denoise(noisy, timestep):  # the perfect denoiser of a data set that is `target` alone
...     alpha, sigma = (level[:, None, None] for level in process.levels(timestep))
...     return process.target(target, (noisy - alpha * target) / sigma, timestep)
>>> latent = sample(denoise, noise, scheduler, run)
>>> torch.allclose(latent, target, atol=1e-4)
True
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from foley.core.locks import sole_user
from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator, RunContext, SamplerCallback, StepContext, followers, forecast
from foley.diffusion.graphs import Recorder, recorded
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, Denoise, EvaluationGrid, KnownLatent
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.schedulers import combine, draw_noise
from foley.diffusion.solver import Solver
from foley.diffusion.windows import Windows

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the loop's range to draw a progress bar; `iter` draws none."""


@dataclass(frozen=True)
class Start:
    """Begin at a noised latent instead of at pure noise (SDEdit, Meng et al. 2022, algorithm 1).

    `clean` `[B, C, L]`, or one row for all items, is brought to the noise level at which solver step `step` begins.
    Step 0 is pure noise, whatever `clean` is; the number of steps is no noise at all, and returns `clean`.
    """

    clean: Tensor
    step: int


@torch.no_grad()
def sample(
    denoise: Denoise,
    noise: Tensor,
    scheduler: Any,
    run: RunContext,
    callbacks: Sequence[SamplerCallback] = (),
    generators: list[torch.Generator] | None = None,
    progress: Progress = iter,
    start: Start | None = None,
    known: KnownLatent | None = None,
) -> Tensor:
    """Integrate from `noise` `[B, C, L]` to a clean latent `[B, C, L]`; nothing in the loop waits for the device.

    Args:
        denoise: guided prediction from `(noisy [B, C, L], timestep [B])`.
        noise: standard normal.
        scheduler: a scheduler with its timesteps set, of `Solver.build` or of `diffusers`; used up by this call.
        run: what the callbacks are told about this run.
        callbacks: told of the run and each evaluation; `on_run_end` follows every `on_run_start`, on error too.
        generators: one per item, on the CPU, for solvers that add noise on the way, so that an item ignores its batch.
        progress: wraps the range of evaluations.
        start: where to begin; evaluations before it are left out, and the others keep their numbers.
        known: frames, in one row or one per item, that come back as given. Before each evaluation they are noised to
            its level (Lugmayr et al. 2022, equation 8a), as in masked training; what is predicted there is not used.
    """
    # Schedulers that step in the model's own space (flow) do not define an input scaling.
    scale_input = getattr(scheduler, "scale_model_input", lambda latent, timestep: latent)
    latent, first_evaluation = _begin(noise, scheduler, start)  # [B, C, L]
    # One copy for all evaluations: each would wait for the device. The scheduler keeps its own on the CPU.
    timesteps = scheduler.timesteps.to(noise.device)
    with ExitStack() as stack:  # ends what has begun, on error too
        for callback in callbacks:
            stack.callback(callback.on_run_end)  # first, so that one that fails to start ends too
            callback.on_run_start(run)
        for evaluation in progress(range(first_evaluation, run.num_evaluations)):
            context = StepContext(evaluation, scheduler.timesteps[evaluation], run, run.branch(evaluation))
            for callback in callbacks:
                callback.on_evaluation_start(context)
            if known is not None:  # [B, C, L], given frames replaced by themselves at this noise level
                latent = known.fill(latent, _noised(known.visible, noise, scheduler, evaluation))
            noisy = scale_input(latent, context.timestep)
            prediction = _predict(denoise, callbacks, context, noisy, timesteps[evaluation])
            for callback in callbacks:
                callback.on_evaluation_end(context, prediction)
            extras = _noise_source(scheduler, evaluation, latent, generators)
            latent = scheduler.step(prediction, context.timestep, latent, return_dict=False, **extras)[0]
    return latent if known is None else known.fill(latent, known.visible)


def _predict(
    denoise: Denoise, callbacks: Sequence[SamplerCallback], context: StepContext, noisy: Tensor, timestep: Tensor
) -> Tensor:
    """What the denoiser says of `noisy` `[B, C, L]`, or a callback's forecast of it, so that it need not run."""
    guess = forecast(callbacks, context, noisy)
    return denoise(noisy, timestep.expand(len(noisy))) if guess is None else guess


def _begin(noise: Tensor, scheduler: Any, start: Start | None) -> tuple[Tensor, int]:
    """The latent `[B, C, L]`, in the scheduler's own scaling, of the first evaluation, and the number of that."""
    # A second-order solver evaluates twice in each step but the last; its timesteps repeat, so only an index is exact.
    evaluation = 0 if start is None else start.step * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(evaluation)
    if start is None or evaluation == 0:  # solvers in sigma space begin at sigma times the noise
        return noise * getattr(scheduler, "init_noise_sigma", 1.0), 0
    if evaluation >= len(scheduler.timesteps):
        return start.clean.expand_as(noise), evaluation
    return _noised(start.clean, noise, scheduler, evaluation), evaluation


def _noise_source(
    scheduler: Any, evaluation: int, latent: Tensor, generators: list[torch.Generator] | None
) -> dict[str, Any]:
    """The arguments of `step` that noise comes by."""
    if hasattr(scheduler, "adds_noise"):
        return {"variance_noise": _drawn(scheduler, evaluation, latent, generators)} if scheduler.adds_noise else {}
    # One of `diffusers` draws for itself.
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _drawn(scheduler: Any, evaluation: int, latent: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """One draw, or the sum of finer ones where the noise is shared by time (`foley.diffusion.solver.noise_weights`)."""
    if not hasattr(scheduler, "noise_weights"):
        return draw_noise(latent, generators)
    # Drawn one by one, in the order of the common grid: only so do runs of other steps see the same draws.
    noise = torch.zeros_like(latent)
    for weight in scheduler.noise_weights[evaluation]:
        noise = torch.add(noise, draw_noise(latent, generators), alpha=weight)
    return noise


def _noised(clean: Tensor, noise: Tensor, scheduler: Any, evaluation: int) -> Tensor:
    """`clean`, one row or `[B, C, L]`, at the noise level of the next evaluation, in the scheduler's own scaling."""
    timestep = scheduler.timesteps[evaluation].expand(1)

    def add_noise(clean: Tensor, noise: Tensor) -> Tensor:
        if hasattr(scheduler, "scale_noise"):  # flow
            return scheduler.scale_noise(clean, timestep, noise)
        return scheduler.add_noise(clean, noise, timestep)

    return combine(add_noise, clean.expand_as(noise), noise)


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
    recorder: Recorder | None = None,
    compiler: Callable[[Denoise], Denoise] | None = None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
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
        recorder: records evaluations as graphs, in runs of enough of them; None runs each as it is.
        compiler: makes one graph of a guided evaluation (`foley.accel.compiling.compile_evaluation`).
        more: further inputs of the denoiser, one row for all items, on `device`; without windows.

    Threads may share a denoiser: they take turns. Raises ValueError where the solver does not fit the process.
    """
    scheduler, shape = solver.build(process), (denoiser.latent_channels, num_frames)
    # One generator an item and purpose: an item is the same whatever batch it is in.
    noise = torch.stack([torch.randn(shape, generator=own) for own in _generators("initial noise", seeds)])
    generators = _generators("solver noise", seeds)  # which only stochastic solvers use
    run = solver.run_context(scheduler, guidance, len(seeds), process)
    # Timesteps are known before the first evaluation, so a denoiser can prepare all of them at once.
    grid = EvaluationGrid(scheduler.timesteps.to(device), num_frames, windows)
    guided = guidance.wrap(denoiser, positive, negative, known, grid, _rows(more, len(seeds)))
    denoise, run = recorded(guided if compiler is None else compiler(guided), run, recorder, accelerator)
    with sole_user(denoiser), nullcontext() if accelerator is None else accelerator.attach(denoiser):
        callbacks = followers(guided, accelerator)
        return sample(denoise, noise.to(device), scheduler, run, callbacks, generators, progress, start, known)


def _rows(more: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    """One row of each input for each item."""
    return {name: row.expand(batch_size, *row.shape[1:]) for name, row in more.items()}


def _generators(purpose: str, seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch_generator(purpose, seed) for seed in seeds]
