"""Steps that never wait for a device: what schedulers of diffusers look up, solve and draw is done on the CPU.

A step of a solver is linear in the latent, the predictions and the noise, with coefficients that follow from the
schedule. Where diffusers works them out on the device of the latent, each `.to(device)`, linear solve and search for a
timestep waits for all work queued there. `combine` applies such an update to unit vectors on the CPU, which gives its
coefficients as numbers, and adds up the tensors with them.
"""

from collections.abc import Callable
from itertools import pairwise
from math import exp, expm1, hypot, log, sqrt
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from foley.core.devices import to_device
from foley.diffusion.process import DiffusionProcess

_ddpm: Any = DDPMScheduler
_unipc: Any = UniPCMultistepScheduler


def combine(update: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`update(*tensors)` `[B, C, L]` of an update that is linear in tensors of that shape.

    >>> combine(lambda x, y: 3 * x - 0.5 * y, torch.ones(1, 2, 4), torch.full((1, 2, 4), 2.0))[0, 0]
    tensor([2., 2., 2., 2.])
    """
    first, *others = coefficients(update, len(tensors))
    result = first * tensors[0]
    for coefficient, tensor in zip(others, tensors[1:], strict=True):
        result = torch.add(result, tensor, alpha=coefficient)
    return result


def coefficients(update: Callable[..., Tensor], count: int) -> list[float]:
    """Of an update that is linear in its `count` arguments."""
    units = torch.eye(count)[:, None, None]  # each [1, 1, K]
    weights: list[float] = update(*units).flatten().tolist()
    return weights


def draw_noise(like: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """Standard normal, shaped and placed as `like [B, C, L]`; drawn on the CPU, each item by its own generator."""
    noise = randn_tensor(tuple(like.shape), generator=generators, device=torch.device("cpu"), dtype=like.dtype)
    return to_device(noise, like.device)


class DDIMScheduler:
    """DDIM (Song et al. 2021, equations 12 and 16) from each timestep's noise level to that of the next.

    A step takes the signal level from alpha to alpha', the noise level from sigma to sigma', and adds fresh noise z:

        latent' = alpha' clean + sqrt(sigma'^2 - s^2) noise + s z
        s = eta sigma' / sigma sqrt(1 - (alpha / alpha')^2)

    The step from pure noise is all fresh noise at eta = 1: sigma'^2 - s^2 is 0, but rounds to less in float32. So the
    root is taken of the same thing as a sum of squares, sigma'^2 ((1 - eta^2) + (eta alpha sigma' / (alpha' sigma))^2).

    Args:
        timesteps: `[num_steps]`, noisiest first; after the last one comes the clean latent.
        eta: 0 is deterministic, 1 the ancestral sampling of DDPM.
    """

    order = 1

    def __init__(self, process: DiffusionProcess, timesteps: Tensor, eta: float = 0.0) -> None:
        self.process = process
        self.timesteps = timesteps
        self.eta = eta

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`clean` at the noise level of `timestep [B]`."""
        return self.process.add_noise(clean, noise, timestep)

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        latent: Tensor,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The latent `[B, C, L]` of the next timestep; `variance_noise` is z, without effect at eta = 0."""
        now = timestep.expand(1)
        alpha, sigma = self._levels(now)
        next_alpha, next_sigma = self._levels(self.timesteps[self.timesteps < timestep][:1])
        kept = next_sigma * hypot(sqrt(1 - self.eta**2), self.eta * alpha * next_sigma / (next_alpha * sigma))
        fresh = self.eta * next_sigma / sigma * sqrt(1 - (alpha / next_alpha) ** 2)  # s

        def move(noisy: Tensor, prediction: Tensor) -> Tensor:
            clean = self.process.to_clean(noisy, prediction, now)
            return next_alpha * clean + kept * self.process.to_noise(noisy, prediction, now)

        moved = combine(move, latent, prediction)
        return (moved if variance_noise is None else torch.add(moved, variance_noise, alpha=fresh),)

    def _levels(self, timestep: Tensor) -> tuple[float, float]:
        """Signal and noise level at `timestep [1]`; those of the clean latent at none, `[0]`."""
        if not len(timestep):
            return 1.0, 0.0
        alpha, sigma = self.process.levels(timestep)
        return float(alpha), float(sigma)


class AncestralScheduler(DDPMScheduler):  # type: ignore[misc]
    """`DDPMScheduler` that is given its noise (Ho et al. 2020, algorithm 2)."""

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, variance_noise: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The latent `[B, C, L]` of the next timestep."""

        def mean(prediction: Tensor, noisy: Tensor) -> Tensor:
            # What diffusers would draw here is multiplied by `_get_variance`, 0.
            drawn = torch.Generator()
            latent: Tensor = _ddpm.step(self, prediction, timestep, noisy, generator=drawn, return_dict=False)[0]
            return latent

        latent = combine(mean, model_output, sample)
        if timestep == 0:
            return (latent,)
        return (torch.add(latent, variance_noise, alpha=float(_ddpm._get_variance(self, timestep).sqrt())),)

    def _get_variance(self, t: Any, **_: Any) -> Tensor:
        return torch.zeros(())


class ThirdOrderSDEScheduler(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM++ 3M SDE as k-diffusion has it, by which Stable Audio Open is sampled.

    With h the step in log(alpha / sigma), z = 2 h, and the clean latent D0 + D1 x + D2 x^2 at the share x of the step:

        latent' = sigma' / sigma exp(-h) latent + alpha' ((1 - exp(-z)) D0 + phi_2 D1 - phi_3 D2) + fresh noise
        phi_2 = 1 - (1 - exp(-z)) / z        phi_3 = phi_2 / z - 1/2

    `DPMSolverMultistepScheduler` has the sign of that 1/2 wrong: D2 then weighs -1, however small the step. Integrated
    exactly it would weigh -2 phi_3, but all published codes take half of it; so the error still falls with the square
    of the step, as second order's does, which is larger.
    """

    sigmas: Tensor  # sigma / alpha, on the CPU
    step_index: int

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[Tensor], *_: Any, sample: Tensor, noise: Tensor, **__: Any
    ) -> Tensor:
        """The latent `[B, C, L]` after a step, from the last three estimates of the clean one, the newest last."""
        ratios = [float(self.sigmas[self.step_index + offset]) for offset in (-2, -1, 0, 1)]  # sigma / alpha
        earlier, last, h = (log(ratio / later) for ratio, later in pairwise(ratios))
        r0, r1, z = last / h, earlier / h, 2 * h
        alpha, next_alpha = (1 / hypot(1, ratio) for ratio in ratios[2:])
        third, second, newest = model_output_list[-3:]

        def update(latent: Tensor, newest: Tensor, second: Tensor, third: Tensor) -> Tensor:
            slope, before = (newest - second) / r0, (second - third) / r1
            curvature = (slope - before) / (r0 + r1)  # D2
            phi_2 = expm1(-z) / z + 1
            clean = -expm1(-z) * newest + phi_2 * (slope + r0 * curvature) - (phi_2 / z - 0.5) * curvature
            return next_alpha * (exp(-z) / alpha * latent + clean)

        moved = combine(update, sample, newest, second, third)
        return torch.add(moved, noise, alpha=next_alpha * ratios[3] * sqrt(-expm1(-z)))


class UniPCScheduler(UniPCMultistepScheduler):  # type: ignore[misc]
    """`UniPCMultistepScheduler` that solves for its coefficients on the CPU (Zhao et al. 2023, algorithms 1 and 2)."""

    model_outputs: list[Tensor | None]  # the oldest first, None where there are none yet

    def multistep_uni_p_bh_update(self, model_output: Tensor, *, sample: Tensor, order: int) -> Tensor:
        """The predictor: linear in the latent and in the outputs so far."""

        def update(latent: Tensor) -> Tensor:
            result: Tensor = _unipc.multistep_uni_p_bh_update(self, latent, sample=latent, order=order)
            return result

        return self._combine_with_outputs(update, sample)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """The corrector: linear in the present output, the latent before it, and the outputs so far."""

        def update(output: Tensor, latent: Tensor) -> Tensor:
            # Of `this_sample` it takes device and type alone.
            given = {"last_sample": latent, "this_sample": latent, "order": order}
            result: Tensor = _unipc.multistep_uni_c_bh_update(self, output, **given)
            return result

        return self._combine_with_outputs(update, this_model_output, last_sample)

    def _combine_with_outputs(self, update: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        outputs = self.model_outputs
        known = [output for output in outputs if output is not None]

        def with_outputs(*units: Tensor) -> Tensor:
            self.model_outputs = [None] * (len(outputs) - len(known)) + [*units[len(tensors) :]]
            try:
                return update(*units[: len(tensors)])
            finally:
                self.model_outputs = outputs

        return combine(with_outputs, *tensors, *known)
