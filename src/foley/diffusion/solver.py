"""Solvers by name: schedulers of `diffusers`, set up for a `DiffusionProcess`.

Zero terminal SNR makes the noisiest sigma infinite. DDIM and DDPM step in alpha space and take it as it is. Solvers
that step in sigma or log-SNR space get a last `alphas_cumprod` of 2^-24 instead of 0 (a largest sigma of 4096), as
diffusers does for its own rescaled schedules. Heun's second-order correction over such a first step would amplify
every error of the model, so it starts at sigma 80 on the grid of Karras et al. 2022 (equation 5) instead. From sigma s
to r below it, that correction weighs the difference of two estimates of the clean latent by (s / r - 1) / 2. So where
steps are few, the grid ends at a larger sigma, such that s / r stays below a bound; the last step, of first order, then
removes the noise that is left.

Stable Audio's process (`CosineProcess`) knows all times, and ends at sigma 500: there every solver takes its own grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from foley.core.numbers import SHARE
from foley.diffusion.context import CONSISTENCY, RunContext
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import CosineProcess, DiffusionProcess
from foley.diffusion.schedulers import AncestralScheduler, DDIMScheduler, ThirdOrderSDEScheduler, UniPCScheduler

_SMALLEST_SIGNAL_POWER = 2.0**-24  # alpha^2, for solvers that divide by alpha
_HEUN_LARGEST_SIGMA = 80.0  # sigma / alpha; Karras et al. 2022, table 1
_KARRAS_RHO = 7.0  # of the same table: how much denser the grid is near the data
_HEUN_LARGEST_RATIO = 4.5  # of neighbouring sigmas; ten steps between 80 and 0.03 stay below it by themselves
_PREDICTION_TYPE = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}


@dataclass(frozen=True)
class _Entry:
    scheduler: type
    options: Mapping[str, Any] = field(default_factory=dict)
    finite_sigma: bool = True  # whether it steps in sigma or log-SNR, and so divides by alpha
    adds_noise: bool = False  # whether it takes `variance_noise` at each step


# Trailing spacing begins at the last training step, which alone is pure noise (Lin et al. 2024, section 3.3).
# Latents are no pixels: nothing clips them to [-1, 1].
_DIFFUSION_SOLVERS = {
    "ddim": _Entry(DDIMScheduler, finite_sigma=False),
    "ddpm": _Entry(
        AncestralScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, finite_sigma=False, adds_noise=True
    ),
    "euler": _Entry(EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "heun": _Entry(HeunDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "dpmpp_2m": _Entry(DPMSolverMultistepScheduler, {"solver_order": 2, "timestep_spacing": "trailing"}),
    "dpmpp_3m": _Entry(DPMSolverMultistepScheduler, {"solver_order": 3, "timestep_spacing": "trailing"}),
    "dpmpp_2m_sde": _Entry(
        DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"},
        adds_noise=True,
    ),
    "dpmpp_3m_sde": _Entry(
        ThirdOrderSDEScheduler,
        # "heun" is k-diffusion's second order, which its second step takes.
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "timestep_spacing": "trailing"},
        adds_noise=True,
    ),
    "unipc": _Entry(UniPCScheduler, {"timestep_spacing": "trailing"}),
}
_FLOW_SOLVERS = {
    "euler_flow": _Entry(FlowMatchEulerDiscreteScheduler),
    "heun_flow": _Entry(FlowMatchHeunDiscreteScheduler),
}
SOLVERS = (*_DIFFUSION_SOLVERS, *_FLOW_SOLVERS)


def default_solver(process: DiffusionProcess) -> str:
    """The first-order solver that fits: DDIM, or Euler steps along a flow."""
    return "euler_flow" if process.is_flow else "ddim"


def solver_label(name: str, eta: float) -> str:
    """The name under which calibrations are kept: with fresh noise at each step, layers change otherwise.

    >>> solver_label("ddim", 0.0), solver_label("ddim", 0.5)
    ('ddim', 'ddim_eta0.5')
    """
    return f"{name}_eta{eta:g}" if eta else name


@dataclass(frozen=True)
class Solver:
    """A solver's name and its number of steps; raises ValueError for an unknown name or fewer than one step.

    Heun's solvers evaluate the denoiser `2 * num_steps - 1` times, all others `num_steps` times.

    Args:
        name: one of `SOLVERS`; deterministic but for "ddpm" and those that end in "_sde".
        num_steps: steps from noise to the clean latent.
        eta: of "ddim" alone, in [0, 1]: how much of the noise of each step is fresh; 1 is "ddpm".
        shared_with: numbers of steps of runs with which this one shares its noise by time, see `noise_weights`.

    Example:
        >>> Solver("ddim", 5).build(DiffusionProcess("v")).timesteps  # trailing: begins at pure noise
        tensor([999, 799, 599, 399, 199])
        >>> len(Solver("heun", 5).build(DiffusionProcess("v")).timesteps)  # evaluations
        9
        >>> Solver("euler_flow", 4).build(DiffusionProcess("flow")).timesteps
        tensor([1000.,  750.,  500.,  250.])
    """

    name: str = "ddim"
    num_steps: int = 50
    eta: float = field(default=0.0, kw_only=True)
    shared_with: tuple[int, ...] = field(default=(), kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.name not in (*SOLVERS, CONSISTENCY):
            raise ValueError(f"unknown solver {self.name!r}; choose one of {', '.join(SOLVERS)}, {CONSISTENCY}")
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"the number of solver steps must be a whole number >= 1, got {self.num_steps!r}")
        SHARE.check("eta", self.eta)
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta={self.eta:g} is an option of solver 'ddim' alone, got {self.name!r}; leave it at 0")

    @property
    def label(self) -> str:
        """What callbacks know it by, see `solver_label`."""
        return solver_label(self.name, self.eta)

    def build(self, process: DiffusionProcess) -> Any:
        """A fresh `diffusers` scheduler with its timesteps set, noisiest first.

        Raises ValueError where the solver does not fit the process's prediction type or schedule length.
        """
        if self.name == CONSISTENCY:
            raise ValueError(
                f"solver {CONSISTENCY!r} samples students only, which experiment=audiolcm distils; "
                f"choose one of {', '.join(SOLVERS)}"
            )
        table = _FLOW_SOLVERS if process.is_flow else _DIFFUSION_SOLVERS
        if self.name not in table:
            raise ValueError(
                f"solver {self.name!r} cannot sample a model that predicts {process.prediction!r}; "
                f"choose one of {', '.join(table)}"
            )
        # The scheduler carries state from step to step, so every run builds its own.
        scheduler = self._build(table[self.name], process)
        # Both for `foley.diffusion.sampler`.
        scheduler.adds_noise = table[self.name].adds_noise or self.eta > 0
        if scheduler.adds_noise and self.shared_with:
            others = [replace(self, num_steps=steps, shared_with=()).build(process) for steps in self.shared_with]
            times = [_log_snr(process, other.timesteps.cpu()) for other in (scheduler, *others)]
            scheduler.noise_weights = noise_weights(times[0], times)
        return scheduler

    def run_context(
        self,
        scheduler: Any,
        guidance: ClassifierFreeGuidance,
        batch_size: int,
        process: DiffusionProcess | None = None,
    ) -> RunContext:
        """What callbacks learn about a run with `scheduler`; of the noise levels, where they know the process."""
        known = self.label, self.num_steps, scheduler.timesteps, guidance.scale, guidance.rescale, batch_size
        adds_noise = getattr(scheduler, "adds_noise", False)
        same: Any = {"adds_noise": adds_noise, "branches": guidance.branches(len(scheduler.timesteps))}
        if process is None:
            return RunContext(*known, **same)
        log_snr = _log_snr(process, scheduler.timesteps.cpu())
        return RunContext(*known, log_snr=log_snr, clean_weights=process.clean_weights(log_snr), **same)

    def _build(self, entry: _Entry, process: DiffusionProcess) -> Any:
        if isinstance(process, CosineProcess):  # which knows all times
            return self._build_cosine(entry, process)
        if self.num_steps > process.num_train_steps:
            raise ValueError(
                f"{self.num_steps} solver steps asked for, but the model was trained on {process.num_train_steps}"
            )
        return self._build_flow(entry, process) if process.is_flow else self._build_diffusion(entry, process)

    def _build_cosine(self, entry: _Entry, process: CosineProcess) -> Any:
        """Steps of equal length in log(alpha / sigma), and a last one to the clean latent."""
        sigmas = process.sigmas(self.num_steps)
        if not entry.finite_sigma:
            return DDIMScheduler(process, process.timesteps(sigmas), 1.0 if entry.adds_noise else self.eta)
        if self.name == "heun":  # twice at each sigma but the first
            sigmas = process.sigmas(self.num_steps, _HEUN_LARGEST_RATIO)
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        scheduler = entry.scheduler(prediction_type="v_prediction", **entry.options)
        scheduler.set_timesteps(1)  # which makes it ready; its grid is that of another schedule
        scheduler.sigmas, scheduler.timesteps = torch.cat([sigmas, sigmas.new_zeros(1)]), process.timesteps(sigmas)
        return scheduler

    def _build_diffusion(self, entry: _Entry, process: DiffusionProcess) -> Any:
        if self.name == "ddim":
            return DDIMScheduler(process, torch.from_numpy(self._trailing(process.num_train_steps)), self.eta)
        signal_power = process.alphas_cumprod.numpy()
        if entry.finite_sigma:  # sigma / alpha is what these solvers step in, and it must not be infinite
            signal_power = signal_power.clip(min=_SMALLEST_SIGNAL_POWER)
        # diffusers takes betas alone: undo the running product, alpha_t^2 = prod(1 - beta).
        betas = 1 - signal_power / np.concatenate([[1.0], signal_power[:-1]])
        scheduler = entry.scheduler(
            num_train_timesteps=process.num_train_steps,
            trained_betas=betas.tolist(),
            prediction_type=_PREDICTION_TYPE[process.prediction],
            **entry.options,
        )
        if self.name == "heun":
            scheduler.set_timesteps(timesteps=_karras_timesteps(signal_power, self.num_steps))
        else:
            self._trailing(process.num_train_steps)
            scheduler.set_timesteps(self.num_steps)
        return scheduler

    def _trailing(self, num_train_steps: int) -> np.ndarray:
        """The timesteps of trailing spacing, as diffusers rounds them."""
        timesteps = np.arange(num_train_steps, 0, -num_train_steps / self.num_steps).round().astype(np.int64) - 1
        # For a few step counts (463, for one) rounding adds a step at timestep -1.
        if len(timesteps) != self.num_steps:
            raise ValueError(f"no evenly spaced schedule of {self.num_steps} steps; take one step more or less")
        return timesteps

    def _build_flow(self, entry: _Entry, process: DiffusionProcess) -> Any:
        scheduler = entry.scheduler(num_train_timesteps=process.num_train_steps)
        if self.name == "euler_flow":  # t from 1 down in equal steps; the scheduler appends the 0
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / self.num_steps, self.num_steps).tolist())
        else:
            scheduler.set_timesteps(self.num_steps)
        return scheduler


def noise_weights(own: Tensor, grids: Sequence[Tensor]) -> list[list[float]]:
    """For each step of a run, by what its finer draws are weighed in its one draw of noise z.

    A step from (alpha, sigma) to (alpha', sigma') adds sigma'^2 / alpha' sqrt(SNR' - SNR) z to the latent, of DDPM as
    of SDE-DPM++, with SNR = alpha^2 / sigma^2. So the noise in alpha / sigma^2 times the latent is a Brownian motion,
    whose time is SNR. Runs whose steps lie elsewhere follow one path of it where each adds up the increments between
    the times of all of them: z = sum_i sqrt(d_i / sum d) z_i, with d_i the finer steps in SNR.

    Args:
        own: log-SNR at the evaluations of the run `[E]`, rising.
        grids: of all runs that share the path, this one among them. Those of one number of draws draw alike.

    >>> start, middle = float("-inf"), 0.0  # the last step goes to the clean latent, which no draw reaches
    >>> coarse, fine = torch.tensor([start, 1.0]), torch.tensor([start, middle, 1.0])
    >>> [[round(weight ** 2, 3) for weight in step] for step in noise_weights(coarse, [coarse, fine])]
    [[0.368, 0.632], [1.0]]
    """
    times = torch.cat(list(grids)).double().unique()  # of all runs, rising
    places = torch.searchsorted(times, own.double()).tolist()
    snr = times.exp()
    weights = []
    for first, last in zip(places, [*places[1:], len(times)], strict=True):
        steps = snr[first : last + 1].diff()[: last - first]
        if last == len(times):  # to infinity: the last draw outweighs the others
            steps = torch.cat([torch.zeros_like(steps), steps.new_ones(1)])
        weights.append((steps / steps.sum()).sqrt().tolist())
    return weights


def _log_snr(process: DiffusionProcess, timesteps: Tensor) -> Tensor:
    """`[E]`; between two steps of the training, where solvers in sigma space evaluate, on the line through both."""
    if process.is_flow or isinstance(process, CosineProcess):
        return process.snr(timesteps).double().log()
    known = process.snr(torch.arange(process.num_train_steps)).double().log().numpy()
    return torch.from_numpy(np.interp(timesteps.double().numpy(), np.arange(len(known)), known))


def _karras_timesteps(signal_power: np.ndarray, num_steps: int) -> list[float]:
    """Fractional timesteps of a Karras grid from `_HEUN_LARGEST_SIGMA` to the smallest sigma that few steps reach."""
    sigmas = np.sqrt((1 - signal_power) / signal_power)  # sigma / alpha of each training timestep
    largest, smallest = (float(end) ** (1 / _KARRAS_RHO) for end in (min(_HEUN_LARGEST_SIGMA, sigmas[-1]), sigmas[0]))
    # On the grid's evenly spaced roots, neighbours differ most in ratio at the end: bound that of the last two.
    smallest = max(smallest, largest / (1 + (num_steps - 1) * (_HEUN_LARGEST_RATIO ** (1 / _KARRAS_RHO) - 1)))
    grid = np.linspace(largest, smallest, num_steps) ** _KARRAS_RHO  # Karras et al. 2022, equation 5
    # The denoiser was trained on timesteps: find each sigma between two of them, where log sigma is nearly linear.
    timesteps: list[float] = np.interp(np.log(grid), np.log(sigmas), np.arange(len(sigmas))).tolist()
    return timesteps
