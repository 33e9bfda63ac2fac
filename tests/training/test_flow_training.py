"""Flow matching as a training objective: the closed forms of Gaussian data, through the objective that trains."""

import pytest
import torch
from torch import Tensor, nn

from foley.core.seeding import torch_generator
from foley.diffusion.process import DiffusionProcess
from foley.models.codec.normaliser import LatentNormaliser
from foley.training.diffusion import DiffusionTraining

MEAN, STD = 0.7, 0.5
TIMES = torch.tensor([100.0, 500.0, 900.0])


def slope_and_offset(t: Tensor) -> tuple[Tensor, Tensor]:
    """`E[noise - clean | z] = slope z + offset`, clean normal with MEAN and STD, z = (1 - t) clean + t noise.

    The slope is the covariance of the velocity with z over the variance of z.
    """
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return slope, -MEAN - slope * (1 - t) * MEAN


class AffineVelocity(nn.Module):
    """`slope z + offset`, one of each for each time of `TIMES`."""

    latent_channels = 1

    def __init__(self, slope: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(slope.clone()), nn.Parameter(offset.clone())

    def forward(self, noisy: Tensor, timestep: Tensor, **_: object) -> Tensor:
        index = (timestep[:, None] == TIMES).long().argmax(dim=1)
        return self.slope[index][:, None, None] * noisy + self.offset[index][:, None, None]


def loss(denoiser: nn.Module, purpose: object, frames: int) -> Tensor:
    """The objective's error `[3]` at each time, on fresh draws."""
    process = DiffusionProcess("flow")
    module = DiffusionTraining(denoiser, process, LatentNormaliser(1), torch.optim.SGD)
    clean = MEAN + STD * torch.randn(3, 1, frames, generator=torch_generator("clean", purpose))
    noise = torch.randn(clean.shape, generator=torch_generator("noise", purpose))
    everything = torch.ones(3, frames, dtype=torch.bool)
    return module._errors(clean, noise, TIMES, None, everything, None)


def test_the_loss_of_the_exact_velocity_is_its_conditional_variance() -> None:
    """Which is `STD^2` over the variance of z: straight lines leave nothing else."""
    t = TIMES / 1000
    expected = STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    found = loss(AffineVelocity(*slope_and_offset(t)), "exact", 100_000).detach()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_training_finds_the_closed_form_velocity() -> None:
    denoiser = AffineVelocity(torch.zeros(3), torch.zeros(3))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for step in range(300):
        optimizer.zero_grad()
        loss(denoiser, step, 1000).sum().backward()
        optimizer.step()
        schedule.step()
    slope, offset = slope_and_offset(TIMES / 1000)
    torch.testing.assert_close(denoiser.slope.detach(), slope, atol=0.02, rtol=0)
    torch.testing.assert_close(denoiser.offset.detach(), offset, atol=0.02, rtol=0)


def test_a_flow_is_trained_at_all_times() -> None:
    drawn = DiffusionProcess("flow").sample_timesteps(10_000, torch_generator("times"))
    assert drawn.min() >= 0
    assert drawn.max() <= 1000
    assert drawn.quantile(torch.tensor([0.1, 0.9])).tolist() == pytest.approx([100, 900], abs=20)
