"""Consistency models of latents, as AudioLCM has them (Liu et al. 2024): what distillation and sampling share.

A consistency function maps any point of a solution of the probability-flow ODE to the solution's clean end, and so the
same end from every point of it (equation 4). It is made of a denoiser that knows the guidance scale w:

    f(z, w, c, t) = c_skip(t) z + c_out(t) x0(z, w, c, t)                                    (12)
    c_skip(t) = s^2 / ((10 t)^2 + s^2),   c_out(t) = 10 t / sqrt((10 t)^2 + s^2),   s = sigma_data

x0 is the clean latent that the prediction implies, for epsilon `(z - sigma_t epsilon) / alpha_t` as the paper has it.
Every prediction type takes this one path. c_skip(0) = 1 and c_out(0) = 0 hold the boundary condition f(z, 0) = z.

Distillation jumps between the points of a grid, k training timesteps apart, with the teacher's guided DDIM solver Psi:

    z_{t_n} - z_{t_{n+k}} = (1 + omega) Psi(z, c) - omega Psi(z, empty)                      (13)

Psi is affine in the prediction, so that one jump with the guided prediction, w = 1 + omega, is the same
(`ddim_jump`). `foley.training.distillation` makes the loss of it, `ConsistencySolver` here samples.

With zero terminal SNR the noisiest point is pure noise. There `c_skip` is below 1e-8 and `c_out` 1, so f is x0 alone:
the negated prediction for v. The noise that a prediction implies there is the point itself, guided or not, so that the
first jump leads from the noise towards the guided mean of the data. Nothing is divided by the signal level, 0 there;
only epsilon would need that, and `DiffusionProcess` refuses it on such a schedule. Without zero terminal SNR the
noisiest point of training holds a little signal, and sampling starts, like every solver here, at noise without any.

**Scales of students.** Every option and file says w, in the convention of `ClassifierFreeGuidance`. AudioLCM trains
on omega in [4, 12], which is w in [5, 13], embeds omega, and samples with a "scale" that is w: its "scale 5" is w = 5,
of which it embeds w - 1 = 4. `Consistency.embedded` is the one place where w becomes what a student is told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from foley.diffusion.guidance import ClassifierFreeGuidance, EmbeddedGuidance
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.schedulers import combine
from foley.diffusion.solver import CONSISTENCY, Solver


def ddim_jump(process: DiffusionProcess, noisy: Tensor, prediction: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """One DDIM step `[B, C, L]` from timestep `start` to `end`, each `[B]`, however far apart: Psi of equation (13)."""
    # Both are affine in the prediction, so a guided prediction gives a guided estimate of both.
    clean, noise = process.to_clean(noisy, prediction, start), process.to_noise(noisy, prediction, start)
    return process.add_noise(clean, noise, end)  # alpha_end x0 + sigma_end epsilon


Embedded = Literal["omega", "scale"]
"""What a student is told of the guidance: AudioLCM's omega = w - 1, or the scale w itself."""


_Scale = TypeVar("_Scale", float, Tensor)


class Consistency:
    """What makes a denoiser a student: its boundary condition, the grid it was distilled on, the scales it has seen.

    Args:
        jump_steps: k, the training timesteps in one jump of the solver; the grid has `num_train_steps / k` points.
        guidance_range: the guidance scales w of distillation.
        sigma_data: standard deviation of the latents, as the boundary condition has it.
        timestep_scaling: how fast the boundary condition gives way to the denoiser.
        embeds: what the denoiser is told, see `embedded`. New students are told omega, as AudioLCM's; those of a config
            that does not say it, such as the one that ships, the scale.

    Raises ValueError for a k below 1, for a range that is none and for another `embeds`.

    Example:
        >>> process, consistency = DiffusionProcess("v"), Consistency(jump_steps=20)
        >>> grid = consistency.grid(process)
        >>> len(grid), grid[0].item(), grid[-1].item()
        (50, 19, 999)
        >>> noisy, prediction = torch.randn(1, 8, 50), torch.randn(1, 8, 50)
        >>> clean_end = consistency.estimate(process, noisy, prediction, grid[-1:])
        >>> torch.allclose(clean_end, -prediction)  # out of pure noise, v is the negated clean latent
        True
        >>> at_zero = consistency.estimate(process, noisy, prediction, torch.tensor([0]))
        >>> torch.allclose(at_zero, noisy)  # the boundary condition
        True
    """

    def __init__(
        self,
        jump_steps: int = 20,
        guidance_range: Sequence[float] = (5.0, 13.0),
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
        embeds: Embedded = "scale",
    ) -> None:
        if jump_steps < 1:
            raise ValueError(f"consistency.jump_steps must be at least 1, got {jump_steps}")
        self.lowest_scale, self.highest_scale = guidance_range
        if not 0 <= self.lowest_scale <= self.highest_scale:
            raise ValueError(f"consistency.guidance_range must be 0 <= low <= high, got {list(guidance_range)}")
        if embeds not in get_args(Embedded):
            raise ValueError(f"consistency.embeds must be omega or scale, got {embeds!r}")
        self.embeds = embeds
        self.jump_steps = jump_steps
        self.sigma_data = sigma_data
        self.timestep_scaling = timestep_scaling

    def scalings(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """`c_skip` and `c_out`, each `[B]`: 1 and 0 at timestep 0, nearly 0 and 1 from the first point of a grid on."""
        scaled = self.timestep_scaling * timestep.float()  # 10 t
        power = scaled.square() + self.sigma_data**2  # (10 t)^2 + s^2
        return self.sigma_data**2 / power, scaled / power.sqrt()  # at t = 19: 7e-6 and 0.999997

    def estimate(self, process: DiffusionProcess, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The consistency function `[B, C, L]`, out of a denoiser's prediction at `timestep [B]`."""
        skip, out = (scaling.to(noisy)[:, None, None] for scaling in self.scalings(timestep))  # [B, 1, 1]
        return skip * noisy + out * process.to_clean(noisy, prediction, timestep)  # (12)

    def grid(self, process: DiffusionProcess) -> Tensor:
        """The N timesteps between which distillation jumps, cleanest first and pure noise last; k lies between two.

        Raises ValueError where k does not divide the length of the noise schedule.
        """
        if process.num_train_steps % self.jump_steps:
            raise ValueError(
                f"consistency.jump_steps={self.jump_steps} does not divide the {process.num_train_steps} training "
                "steps; take a divisor, such as 1, 5, 10, 20 or 50"
            )
        # k, 2 k, ..., up to `num_train_steps`.
        edges = torch.arange(self.jump_steps, process.num_train_steps + 1, self.jump_steps)
        # A flow's times are real and end at num_train_steps; discrete ones count from 0.
        return edges.float() if process.is_flow else edges - 1

    def jump_ends(self, grid: Tensor) -> Tensor:
        """Where the jump from each point of the grid ends `[N]`: at the point before it, the first one's at 0."""
        return torch.cat([torch.zeros_like(grid[:1]), grid[:-1]])  # t_n, for each t_{n+k}

    def guidance(self, guidance: ClassifierFreeGuidance, any_scale: bool = False) -> EmbeddedGuidance:
        """How a student is guided where a teacher would be guided so.

        Args:
            any_scale: allow scales that distillation has not seen.

        Raises ValueError for a rule that changes on the way, a rescale, and such a scale unless it is allowed.
        """
        if not guidance.is_constant:
            rule = type(guidance).__name__
            raise ValueError(f"guidance: a student was distilled with guidance in its weights, and takes no {rule}")
        if guidance.rescale:  # it needs the positive branch, which a student does not have apart
            raise ValueError(f"a student takes no guidance rescale, got {guidance.rescale}; leave it at 0")
        if not any_scale and not self.lowest_scale <= guidance.scale <= self.highest_scale:
            raise ValueError(
                f"guidance scale {guidance.scale} lies outside [{self.lowest_scale}, {self.highest_scale}], the "
                "scales that this student was distilled with; any_guidance_scale=true takes it all the same"
            )
        return EmbeddedGuidance(guidance.scale, self.embedded(guidance.scale))

    def embedded(self, scale: _Scale) -> _Scale:
        """What the denoiser is told of guidance scales w.

        >>> Consistency(embeds="omega").embedded(5.0), Consistency(embeds="scale").embedded(5.0)
        (4.0, 5.0)
        """
        return scale - 1 if self.embeds == "omega" else scale

    def nearest_scale(self, scale: float) -> float:
        """The scale nearest to `scale` that distillation has seen."""
        return min(max(scale, self.lowest_scale), self.highest_scale)


@dataclass(frozen=True)
class ConsistencySolver(Solver):
    """Multi-step consistency sampling (AudioLCM, algorithm 2): one evaluation a step, evenly spread over the grid.

    Args:
        num_steps: evaluations, tau_1 > tau_2 > ... in the algorithm; published results take 1, 2, 4 and 8.
        consistency: the student's own, whose grid and boundary condition it was distilled with.

    Example:
        >>> ConsistencySolver(num_steps=4).build(DiffusionProcess("v")).timesteps
        tensor([999, 759, 499, 259])
    """

    name: str = field(default=CONSISTENCY, init=False)
    num_steps: int = 2
    consistency: Consistency = field(default_factory=Consistency)

    def build(self, process: DiffusionProcess) -> "ConsistencyScheduler":
        """Raises ValueError for more steps than the grid has points."""
        grid = self.consistency.grid(process).flip(0)  # noisiest first
        if self.num_steps > len(grid):
            raise ValueError(f"{self.num_steps} steps asked for, but this student was distilled on {len(grid)} points")
        # From the noisiest point on: sampling begins where the student was trained on pure noise.
        chosen = [index * len(grid) // self.num_steps for index in range(self.num_steps)]
        return ConsistencyScheduler(self.consistency, process, grid[chosen])


class ConsistencyScheduler:
    """Steps as the schedulers of diffusers do: to the clean end, and back to the next timestep with fresh noise.

    Args:
        timesteps: `[num_steps]`, noisiest first.
    """

    order = 1
    adds_noise = True

    def __init__(self, consistency: Consistency, process: DiffusionProcess, timesteps: Tensor) -> None:
        self.consistency = consistency
        self.process = process
        self.timesteps = timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`clean` at the noise level of `timestep [B]`."""
        return self.process.add_noise(clean, noise, timestep)

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        latent: Tensor,
        variance_noise: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The noisy latent `[B, C, L]` of the next timestep, or after the last one the clean latent."""

        def estimate(noisy: Tensor, prediction: Tensor) -> Tensor:
            return self.consistency.estimate(self.process, noisy, prediction, timestep.expand(1))

        clean = combine(estimate, latent, prediction)  # lines 3, 6
        later = self.timesteps[self.timesteps < timestep]  # noisiest first
        if not len(later):  # line 8
            return (clean,)
        return (combine(partial(self.process.add_noise, timestep=later[:1]), clean, variance_noise),)  # line 5
