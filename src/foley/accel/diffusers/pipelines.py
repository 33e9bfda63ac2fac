"""Accelerators on the pipelines of diffusers, which run their own loops: told of the run from the denoiser's calls."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foley.accel.layers import Forward
from foley.diffusion.context import Accelerator, RunContext, StepContext


@contextmanager
def accelerated(denoiser: nn.Module, scheduler: Any, guidance_scale: float, accelerator: Accelerator) -> Iterator[None]:
    """Every generation of a pipeline inside the context runs under `accelerator`; all is as before on any exit.

        with accelerated(pipeline.transformer, pipeline.scheduler, 7.0, Fora(interval=2)):
            pipeline("a dog barks", guidance_scale=7.0)

    The scheduler's timesteps tell one generation from the next, and its step index, or else the timestep's value, one
    evaluation from the next. The guidance branches must run as one joint batch, as a scale above 1 makes them in
    diffusers. `on_evaluation_end` is given the prediction of both branches, before guidance.

    Args:
        denoiser: the pipeline's `transformer` or `unet`.
        scheduler: the pipeline's.
        guidance_scale: as the pipeline is called with.

    Raises:
        RuntimeError: within the context, where the denoiser is called twice at one evaluation.
        ValueError: within the context, where it is called at a timestep that the scheduler does not have.
    """
    driver = _Driver(scheduler, guidance_scale, accelerator)
    own_forward = vars(denoiser).get("forward")  # offloading of diffusers sets one
    with ExitStack() as stack:
        # Undone from the last to the first: the forward, the run, the attachment.
        stack.enter_context(accelerator.attach(denoiser))
        stack.callback(driver.end_run)
        stack.callback(_restore_forward, denoiser, own_forward)
        denoiser.forward = driver.wrap(denoiser.forward)
        yield


def _restore_forward(denoiser: nn.Module, forward: Forward | None) -> None:
    vars(denoiser).pop("forward", None)  # that of the class shows again
    if forward is not None:
        denoiser.forward = forward


class _Driver:
    def __init__(self, scheduler: Any, guidance_scale: float, accelerator: Accelerator) -> None:
        self._scheduler = scheduler
        self._guidance_scale = guidance_scale
        self._accelerator = accelerator
        self._run: RunContext | None = None  # None between generations
        self._evaluation = -1  # the last that the accelerator was told of

    def wrap(self, forward: Forward) -> Forward:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            # Transformers call it `hidden_states`, U-Nets `sample`: [rows, C, ...].
            sample = args[0] if args else kwargs[_first_of(kwargs, "hidden_states", "sample")]
            # One number, or one for each row and all the same.
            timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0]
            context = self._context(len(sample), timestep)
            self._accelerator.on_evaluation_start(context)
            output = forward(*args, **kwargs)
            # A tuple, or an output class that reads as one.
            prediction = output if isinstance(output, Tensor) else output[0]
            self._accelerator.on_evaluation_end(context, prediction)
            return output

        return evaluate

    def end_run(self) -> None:
        """Tell the accelerator, where a run was begun."""
        if self._run is not None:
            self._run = None
            self._accelerator.on_run_end()

    def _context(self, rows: int, timestep: Tensor) -> StepContext:
        # `set_timesteps` makes a new tensor, so that every generation has one of its own.
        if self._run is None or self._run.timesteps is not self._scheduler.timesteps:
            self.end_run()
            self._begin_run(rows // 2 if self._guidance_scale > 1 else rows)  # guidance doubles the rows
        assert self._run is not None
        evaluation = self._index(timestep)
        if evaluation == self._evaluation:
            raise RuntimeError(
                f"the denoiser was called twice at evaluation {evaluation} (timestep {timestep.item():g}): only "
                "pipelines that guide with one joint batch and evaluate once at each timestep can be accelerated"
            )
        self._evaluation = evaluation
        return StepContext(evaluation, timestep, self._run)

    def _begin_run(self, batch_size: int) -> None:
        scheduler = self._scheduler
        solver, num_steps = type(scheduler).__name__, scheduler.num_inference_steps
        # A rescale (0 here) is the pipeline's own affair: it follows the evaluation.
        self._run = RunContext(solver, num_steps, scheduler.timesteps, self._guidance_scale, 0.0, batch_size)
        self._evaluation = -1
        self._accelerator.on_run_start(self._run)

    def _index(self, timestep: Tensor) -> int:
        index = getattr(self._scheduler, "step_index", None)  # exact, and known without waiting for the device
        if index is not None:
            return int(index)
        # Schedulers without an index are asked by value.
        matches = (self._scheduler.timesteps == timestep.to(self._scheduler.timesteps.device)).nonzero()
        if not len(matches):
            raise ValueError(
                f"timestep {timestep.item():g} is none of the {len(self._scheduler.timesteps)} of the scheduler "
                f"({type(self._scheduler).__name__}): give `accelerated` the scheduler that the pipeline uses"
            )
        return int(matches[0])


def _first_of(kwargs: dict[str, Any], *names: str) -> str:
    return next(name for name in names if name in kwargs)
