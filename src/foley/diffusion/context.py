"""What a sampling run tells the outside world, and what may be attached to one: the protocols of callbacks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foley.core.numbers import check_choice

CONSISTENCY = "consistency"
"""The one solver of distilled students, `foley.diffusion.consistency.ConsistencySolver`; no other model knows it."""

AXES = ("timestep", "log_snr", "angle")
"""Along which what a denoiser computes is a function of time, see `RunContext.axis`."""


@dataclass(frozen=True)
class RunContext:
    """One generation. `timesteps` is `[num_evaluations]`, noisiest first.

    A solver may call the denoiser more than once a step (Heun), so accelerators index by evaluation, not by step.
    """

    solver: str
    num_steps: int
    timesteps: Tensor
    guidance_scale: float  # w
    guidance_rescale: float  # phi
    batch_size: int  # items; guidance branches do not count
    is_recorded: bool = False  # evaluations are replayed as graphs: what is kept between them must stay in its place
    log_snr: Tensor | None = None  # log(alpha^2 / sigma^2) of each evaluation, [num_evaluations], -inf of pure noise
    # What the solver does with predictions: the clean latent is the first times the noisy one and the second times the
    # prediction, [num_evaluations, 2]; None where the process is not known.
    clean_weights: Tensor | None = None
    adds_noise: bool = False  # at each step, so that the noisy latent jumps from one evaluation to the next
    # Of guidance, at each evaluation, where it begins or ends on the way; None: all evaluations have as many.
    branches: tuple[int, ...] | None = None

    def branch(self, evaluation: int) -> str:
        """What `StepContext` calls the joint batch: of each stretch of evaluations with as many branches another name.

        >>> run = RunContext("ddim", 4, torch.arange(4), 3.0, 0.0, batch_size=1, branches=(1, 2, 2, 1))
        >>> [run.branch(evaluation) for evaluation in range(4)]
        ['joint', 'joint 2', 'joint 2', 'joint 3']
        """
        changes = sum(one != next_one for one, next_one in pairwise((self.branches or ())[: evaluation + 1]))
        return f"joint {changes + 1}" if changes else "joint"

    @property
    def num_evaluations(self) -> int:
        """NFE of one branch; a joint batch of two counts once."""
        return len(self.timesteps)

    def axis(self, name: str) -> list[float]:
        """Where each evaluation lies: by its timestep, its log-SNR, or the angle arctan(sigma / alpha).

        The angle is finite at pure noise, and v is the derivative of the noisy latent by it. Where the noise levels are
        not known (a pipeline's own scheduler may hide them), all three are the timestep.

        Raises ValueError for another name.

        >>> log_snr = torch.tensor([-torch.inf, 0.0, 2.0])
        >>> run = RunContext("ddim", 3, torch.tensor([999, 666, 333]), 1.0, 0.0, batch_size=1, log_snr=log_snr)
        >>> [round(angle, 3) for angle in run.axis("angle")]  # from pi / 2
        [1.571, 0.785, 0.353]
        """
        check_choice("the axis", name, AXES)
        if name == "timestep" or self.log_snr is None:
            places: list[float] = self.timesteps.double().tolist()
            return places
        log_snr = self.log_snr.double()
        places = (log_snr if name == "log_snr" else torch.exp(-log_snr / 2).arctan()).tolist()
        return places


@dataclass(frozen=True)
class StepContext:
    """One evaluation of the denoiser: `evaluation` counts from 0, the noisiest, also in a run that begins later.

    `branch` tells apart the calls of guidance branches that run one after the other; a joint batch is "joint". It tells
    apart, too, the stretches of a run between which guidance begins or ends (`RunContext.branch`): what was kept in one
    is of other rows than the next has.
    """

    evaluation: int
    timestep: Tensor  # a number, []
    run: RunContext
    branch: str = "joint"


class SamplerCallback(Protocol):
    """Hooks around a sampling run. `on_run_end` is called on error too."""

    def on_run_start(self, run: RunContext) -> None: ...

    def on_evaluation_start(self, context: StepContext) -> None: ...

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None: ...

    def on_run_end(self) -> None: ...


class Accelerator(SamplerCallback, Protocol):
    """A callback that patches a denoiser for as long as its `attach` context is open, and leaves no trace.

    One under which evaluations repeat each other has a `graph_pattern() -> Hashable | None` too, for recordings: equal
    where two evaluations run the same operations on the same memory, None for one that is like no other.
    """

    def attach(self, denoiser: nn.Module) -> AbstractContextManager[object]: ...


def followers(denoise: Any, accelerator: Accelerator | None) -> list[SamplerCallback]:
    """Whom a run tells of its evaluations: guidance that changes on the way, and then what is attached."""
    parts: tuple[Any, ...] = (denoise, accelerator)
    return [part for part in parts if hasattr(part, "on_evaluation_start")]


def forecast(callbacks: Sequence[SamplerCallback], context: StepContext, noisy: Tensor) -> Tensor | None:
    """What a callback expects of the denoiser here `[B, C, L]`, so that it need not run; None where all let it run.

    One that reuses predictions has `forecast(context, noisy) -> Tensor | None`, called before the denoiser would be.
    """
    forecasts = [callback.forecast for callback in callbacks if hasattr(callback, "forecast")]
    return next((guess for one in forecasts if (guess := one(context, noisy)) is not None), None)
