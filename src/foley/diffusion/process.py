"""The forward process, and the conversions between what a denoiser predicts and what a sampler needs.

A clean latent is mixed with standard normal noise, and every prediction type is another mixture of the same two:

    noisy      = alpha * clean + sigma * noise        (1)  Ho et al. 2020, equation 4
    prediction =     b * clean +     a * noise        (2)

========= ======= ======== =====================================
type      a       b        reference
========= ======= ======== =====================================
v         alpha   -sigma   Salimans & Ho 2022, section 4
epsilon   1       0        Ho et al. 2020, equation 14
x0        0       1
flow      1       -1       Lipman et al. 2023 (alpha = 1 - t, sigma = t)
========= ======= ======== =====================================

(1) and (2) are two equations in two unknowns. Solved for them, with the determinant d = alpha a - sigma b:

    clean = (a * noisy - sigma * prediction) / d      (3)
    noise = (alpha * prediction - b * noisy) / d      (4)

d is alpha^2 + sigma^2 = 1 for v, 1 for flow, alpha for epsilon and -sigma for x0. So v and flow are well conditioned at
every noise level, epsilon is singular where the signal ends (alpha = 0) and x0 where the noise does (sigma = 0).
EzAudio (section II-A) predicts v on a schedule that ends in pure noise.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PREDICTIONS = ("v", "epsilon", "x0", "flow")


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale `sqrt(alphas_cumprod)` `[num_train_steps]` so that the last step is pure noise.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = alphas_cumprod.sqrt()  # the signal levels alpha [num_train_steps], which fall
    # Shifted so that the last is 0, then scaled so that the first is what it was; those between keep their proportions.
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


class DiffusionProcess:
    """Adds noise, makes training targets, and converts predictions.

    Timesteps are `[B]`: integers `0..num_train_steps - 1` for v, epsilon and x0; for flow, real numbers
    `num_train_steps * t` with t in [0, 1], so that a denoiser's time embedding sees one range.

    Args:
        prediction: "v", "epsilon", "x0" or "flow".
        num_train_steps: length of the noise schedule.
        beta_start: first beta of the scaled-linear schedule (unused by flow).
        beta_end: last beta of the scaled-linear schedule (unused by flow).
        zero_terminal_snr: rescale the schedule so that the noisiest step holds no signal.
        logit_normal: mean and standard deviation of the logit of t in training, flow's alone (Esser et al. 2024,
            equation 19); None draws t uniformly.

    Raises ValueError for an unknown prediction, for epsilon with zero terminal SNR (at the noisiest step the noise then
    says nothing about the clean latent), and for `logit_normal` without flow.

    Example:
        >>> process = DiffusionProcess("v")
        >>> clean, noise, timestep = torch.randn(2, 8, 50), torch.randn(2, 8, 50), torch.tensor([250, 999])
        >>> noisy = process.add_noise(clean, noise, timestep)
        >>> perfect = process.target(clean, noise, timestep)  # what a denoiser that knows everything would predict
        >>> torch.allclose(process.to_clean(noisy, perfect, timestep), clean, atol=1e-5)
        True
        >>> process.snr(timestep)[1].item()  # the last step holds no signal
        0.0
    """

    def __init__(
        self,
        prediction: str = "v",
        num_train_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = True,
        logit_normal: Sequence[float] | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"process.prediction must be one of {PREDICTIONS}, got {prediction!r}")
        if prediction == "epsilon" and zero_terminal_snr:
            raise ValueError(
                "process.prediction=epsilon cannot be sampled from a zero-terminal-SNR schedule; "
                "set process.zero_terminal_snr=false, or predict v or x0"
            )
        if logit_normal is not None and prediction != "flow":
            raise ValueError(
                f"process.logit_normal={list(logit_normal)} is flow's alone, got prediction={prediction!r}"
            )
        self.prediction = prediction
        self.logit_normal = logit_normal
        self.num_train_steps = num_train_steps
        self.zero_terminal_snr = zero_terminal_snr
        # Scaled linear (Rombach et al. 2022): the square roots of the betas are evenly spaced. In double precision: the
        # last values are small differences of numbers near 1.
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=torch.float64).square()
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # alpha^2 of each timestep [num_train_steps]
        if zero_terminal_snr:
            alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod
        # No module, so no buffer: nothing here is trained, saved or cast to the model's precision. Rounded last of all,
        # and on the CPU, so that levels are the same on every device: MPS knows no float64.
        levels = alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()  # alpha^2 + sigma^2 = 1
        self._levels = {alphas_cumprod.device: levels}

    @property
    def is_flow(self) -> bool:
        """Whether noise and signal are mixed along straight lines instead of on the unit circle."""
        return self.prediction == "flow"

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Signal level alpha and noise level sigma, each `[B]` float32, at `timestep` `[B]`."""
        if self.is_flow:
            sigma = timestep.float() / self.num_train_steps  # t in [0, 1]: straight lines from data to noise
            return 1 - sigma, sigma
        alpha, sigma = self._levels_on(timestep.device)
        return alpha[timestep], sigma[timestep]

    def snr(self, timestep: Tensor) -> Tensor:
        """Signal-to-noise power ratio `alpha^2 / sigma^2`, `[B]`."""
        alpha, sigma = self.levels(timestep)
        return (alpha / sigma).square()

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noisy latent `[B, C, L]` at `timestep` `[B]`, equation (1) of this module."""
        alpha, sigma = self._columns(timestep, clean)  # [B, 1, 1]
        return alpha * clean + sigma * noise  # (1)

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the denoiser learns to predict, `[B, C, L]`, equation (2)."""
        of_noise, of_clean = self._mixture(*self._columns(timestep, clean))
        return of_noise * noise + of_clean * clean  # (2)

    def to_clean(self, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The clean latent that `prediction` implies, `[B, C, L]`, equation (3)."""
        alpha, sigma = self._columns(timestep, noisy)
        of_noise, of_clean = self._mixture(alpha, sigma)
        return (of_noise * noisy - sigma * prediction) / (alpha * of_noise - sigma * of_clean)  # (3)

    def to_noise(self, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The noise that `prediction` implies, `[B, C, L]`, equation (4)."""
        alpha, sigma = self._columns(timestep, noisy)
        of_noise, of_clean = self._mixture(alpha, sigma)
        return (alpha * prediction - of_clean * noisy) / (alpha * of_noise - sigma * of_clean)  # (4)

    def clean_weights(self, log_snr: Tensor) -> Tensor:
        """Equation (3) as two numbers for each `log_snr [E]`: what multiplies noisy and prediction, `[E, 2]` float64.

        >>> DiffusionProcess("v").clean_weights(torch.tensor([-torch.inf, 0.0]))
        tensor([[ 0.0000, -1.0000],
                [ 0.7071, -0.7071]], dtype=torch.float64)
        """
        ratio = torch.exp(-log_snr.double() / 2)  # sigma / alpha
        power = (1 + ratio) if self.is_flow else (1 + ratio.square()).sqrt()
        alpha = 1 / power
        sigma = torch.where(alpha > 0, ratio * alpha, 1.0)  # of pure noise, infinity times 0
        of_noise, of_clean = self._mixture(alpha, sigma)
        return torch.stack([of_noise, -sigma], dim=1) / (alpha * of_noise - sigma * of_clean)[:, None]

    def min_snr_weight(self, timestep: Tensor, gamma: float = 5.0) -> Tensor:
        """Loss weight `[B]`: `min(SNR, gamma)` on the clean latent, restated for this prediction's squared error.

        Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting", equations 4-6: `min(SNR, gamma) / SNR`
        for epsilon and `/ (SNR + 1)` for v. With zero terminal SNR the noisiest step has weight 0: it is then learnt
        only from its neighbours.
        """
        alpha, sigma = self.levels(timestep)
        of_noise, of_clean = self._mixture(alpha, sigma)
        # By (3), an error of the prediction is one of the clean latent sigma / d times as large.
        clean_error_per_error = sigma / (alpha * of_noise - sigma * of_clean)  # [B]
        return (alpha / sigma).square().clamp(max=gamma) * clean_error_per_error.square()

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train on, `[batch_size]`, on the generator's device; uniform unless `logit_normal`."""
        device = generator.device
        if self.logit_normal is not None:
            mean, std = self.logit_normal
            # t near the middle more often than near its ends, where the prediction is easy.
            logit = mean + std * torch.randn(batch_size, generator=generator, device=device)
            return logit.sigmoid() * self.num_train_steps
        if self.is_flow:
            return torch.rand(batch_size, generator=generator, device=device) * self.num_train_steps
        return torch.randint(self.num_train_steps, (batch_size,), generator=generator, device=device)

    def timesteps_at(self, share: Tensor) -> Tensor:
        """Whole timesteps `[B]` at shares `[B]` of the schedule, in [0, 1], the cleanest at 0."""
        return (share * self.num_train_steps).long().clamp(max=self.num_train_steps - 1)

    def _levels_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of all timesteps, each `[num_train_steps]`, copied to each device once."""
        if device not in self._levels:
            alpha, sigma = self._levels[self.alphas_cumprod.device]
            self._levels[device] = alpha.to(device), sigma.to(device)
        return self._levels[device]

    def _columns(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The levels as `[B, 1, 1]`, which spread over `[B, C, L]`, on the device and in the type of `like`."""
        alpha, sigma = self.levels(timestep.to(like.device))
        return alpha.to(like.dtype)[:, None, None], sigma.to(like.dtype)[:, None, None]

    def _mixture(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The factors a (of the noise) and b (of the clean latent) in the module's table, shaped like the levels."""
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        return {"v": (alpha, -sigma), "epsilon": (one, zero), "x0": (zero, one), "flow": (one, -one)}[self.prediction]


class CosineProcess(DiffusionProcess):
    """v at continuous times t in [0, 1], `alpha = cos(pi t / 2)` and `sigma = sin(pi t / 2)`: Stable Audio's.

    Evans et al. 2024. diffusers writes the same in the terms of Karras et al. 2022, whose sigma is `sigma / alpha`
    here, the noise beside a signal of spread 1: c_in = alpha, c_skip = alpha^2, c_out = -sigma, c_noise = t.

    Args:
        sigma_max, sigma_min: `sigma / alpha` at the first and at the last evaluation of a generation.

    >>> process = CosineProcess()
    >>> process.timesteps(process.sigmas(4))
    tensor([0.9987, 0.9849, 0.8255, 0.1855])
    """

    def __init__(self, sigma_max: float = 500.0, sigma_min: float = 0.3) -> None:
        super().__init__("v", zero_terminal_snr=False)
        self.sigma_max = sigma_max
        self.sigma_min = sigma_min

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Signal level alpha and noise level sigma, each `[B]` float32, at `timestep` `[B]`."""
        angle = timestep.float() * (math.pi / 2)
        return angle.cos(), angle.sin()

    def sigmas(self, num_steps: int, largest_ratio: float = math.inf) -> Tensor:
        """`sigma / alpha` at which each step begins, `[num_steps]`: a geometric sequence from the largest on.

        It ends earlier where neighbours would be farther apart than `largest_ratio`.
        """
        last = max(self.sigma_min, self.sigma_max * largest_ratio ** (1 - num_steps))
        return torch.linspace(math.log(self.sigma_max), math.log(last), num_steps).exp()

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """The times t of values of `sigma / alpha`."""
        return sigmas.atan() * (2 / math.pi)

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Times to train on, `[batch_size]`, uniform in [0, 1) on the generator's device."""
        return torch.rand(batch_size, generator=generator, device=generator.device)

    def timesteps_at(self, share: Tensor) -> Tensor:
        """The times t themselves."""
        return share
