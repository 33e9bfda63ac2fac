"""Stable Audio's process and its solvers: against the library's scheduler, closed forms and one Gaussian's data."""

import math

import pytest
import torch
from diffusers import CosineDPMSolverMultistepScheduler

from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import CosineProcess
from foley.diffusion.sampler import sample
from foley.diffusion.solver import SOLVERS, Solver

MEAN, STD = 0.7, 0.5
SAMPLERS = [name for name in SOLVERS if not name.endswith("flow")]


def draw(*key, frames=12):
    return torch.randn(2, 4, frames, generator=torch_generator(*key))


def denoise(noisy, timestep):
    """The exact v when every latent value is normal with MEAN and STD."""
    process = CosineProcess()
    alpha, sigma = (level[:, None, None] for level in process.levels(timestep))
    clean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (noisy - alpha * MEAN)
    return process.target(clean, (noisy - alpha * clean) / sigma, timestep)


def run(name, num_steps, frames):
    solver = Solver(name, num_steps)
    scheduler = solver.build(CosineProcess())
    context = solver.run_context(scheduler, ClassifierFreeGuidance(1.0), 2)
    generators = [torch_generator("z", seed) for seed in (0, 1)]
    return sample(denoise, draw("noise", frames=frames), scheduler, context, (), generators)


def library(num_steps, order=2):
    scheduler = CosineDPMSolverMultistepScheduler(solver_order=order)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("num_steps", [8, 100, 200, 500, 1200])
def test_the_grid_is_that_of_the_library(num_steps):
    process, theirs = CosineProcess(), library(num_steps)
    torch.testing.assert_close(process.sigmas(num_steps), theirs.sigmas[:-1], rtol=2e-6, atol=0)
    for name in SAMPLERS:
        ours = Solver(name, num_steps).build(process)
        once = ours.timesteps[:1].tolist() + ours.timesteps[1 :: 2 if name == "heun" else 1].tolist()
        torch.testing.assert_close(torch.tensor(once), theirs.timesteps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [0, 3, 7])
def test_the_process_is_the_librarys_preconditioning(step):
    """x there is x / alpha here."""
    theirs, process = library(8), CosineProcess()
    theirs._step_index = step
    timestep = theirs.timesteps[step].expand(2)
    alpha = process.levels(timestep)[0][:, None, None]
    noisy, output = draw("x"), draw("v")
    torch.testing.assert_close(theirs.scale_model_input(noisy / alpha, timestep[0]), noisy, rtol=1e-4, atol=1e-5)
    expected = theirs.precondition_outputs(noisy / alpha, output, theirs.sigmas[step])
    torch.testing.assert_close(process.to_clean(noisy, output, timestep), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [4, 20])
@pytest.mark.parametrize(("name", "order"), [("ddpm", 1), ("dpmpp_2m_sde", 2)])
def test_the_orders_that_the_library_has_are_its_own(name, order, num_steps):
    ours, theirs, process = Solver(name, num_steps).build(CosineProcess()), library(num_steps, order), CosineProcess()
    noisy = draw("noise")
    other = noisy * theirs.init_noise_sigma
    for step in range(num_steps):
        timestep, fresh = ours.timesteps[step], draw("fresh", step)
        scaled = theirs.scale_model_input(other, theirs.timesteps[step])
        torch.testing.assert_close(noisy, scaled, rtol=1e-3, atol=1e-4)
        theirs.noise_sampler = lambda *_, fresh=fresh: fresh
        output = denoise(noisy, timestep.expand(2)) + 0.1 * draw("error", step)
        other = theirs.step(output, theirs.timesteps[step], other).prev_sample
        noisy = ours.step(output, timestep, noisy, variance_noise=fresh, return_dict=False)[0]
    torch.testing.assert_close(noisy, other, rtol=1e-3, atol=1e-4)
    assert process.levels(torch.zeros(1))[0] == 1  # the last latent is not scaled


def integral(coefficients, z):
    """Of z exp(-z (1 - x)) times a polynomial in x from 0 to 1: what a step adds, exactly."""
    moments = [1 - math.exp(-z)]
    for power in range(1, len(coefficients)):
        moments.append(1 - power / z * moments[-1])
    return sum(weight * moment for weight, moment in zip(coefficients, moments, strict=True))


@pytest.mark.parametrize(
    ("name", "coefficients", "missing"),
    [
        ("dpmpp_3m_sde", (0.4, -0.7), 0),  # exact of what is linear in log(alpha / sigma)
        ("dpmpp_3m_sde", (0.4, -0.7, 1.1), 1.1),  # half of the curvature's weight, as k-diffusion has it
    ],
)
def test_a_third_order_step_is_k_diffusions(name, coefficients, missing):
    """Of a clean latent that is a polynomial in the share of the third step, from zero and without noise."""
    process = CosineProcess()
    scheduler = Solver(name, 30).build(process)
    latent, nothing = draw("x", frames=1), torch.zeros(2, 4, 1)
    for step in range(3):
        timestep = scheduler.timesteps[step]
        alpha, sigma = (level[:, None, None] for level in process.levels(timestep.expand(2)))
        clean = sum(weight * (step - 2) ** power for power, weight in enumerate(coefficients))
        before = latent
        output = process.target(torch.full_like(latent, clean), (latent - alpha * clean) / sigma, timestep.expand(2))
        latent = scheduler.step(output, timestep, latent, variance_noise=nothing, return_dict=False)[0]
    z = 2 * float((scheduler.sigmas[2] / scheduler.sigmas[3]).log())
    next_alpha = process.levels(scheduler.timesteps[3:4])[0]
    phi_3 = (1 - (1 - math.exp(-z)) / z) / z - 0.5
    expected = next_alpha * (math.exp(-z) * before / alpha + integral(coefficients, z) + missing * phi_3)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_solver_reaches_the_data_but_for_the_last_step(name):
    """What the exact flow makes of the noise down to sigma 0.3, and the mean of the data that it then goes to."""
    out = run(name, 60, frames=1000)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(STD**2 / math.hypot(STD, 0.3), rel=0.05)


def exact(frames):
    """The end of the flow from the noise of `run`."""
    spread = math.hypot(STD, 0.3) / math.hypot(STD, 500) * math.hypot(1, 500)
    at_the_last = MEAN + (draw("noise", frames=frames) - MEAN / math.hypot(1, 500)) * spread
    return MEAN + STD**2 / (STD**2 + 0.3**2) * (at_the_last - MEAN)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_3m", 2)])
def test_errors_fall_at_least_with_the_order_of_the_solver(name, order):
    coarse, fine = ((run(name, steps, frames=50) - exact(50)).norm().item() for steps in (40, 80))
    assert math.log2(coarse / fine) > order - 0.1


def test_third_order_beats_second_and_that_first():
    errors = [(run(name, 40, frames=50) - exact(50)).norm().item() for name in ("dpmpp_3m", "dpmpp_2m", "ddim")]
    assert errors == sorted(errors)
    assert errors[2] > 5 * errors[1] > 8 * errors[0]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_few_steps_of_heun_stay_bounded(num_steps):
    assert run("heun", num_steps, frames=50).abs().max() < 3
    assert len(Solver("heun", num_steps).build(CosineProcess()).timesteps) == 2 * num_steps - 1


def test_flow_solvers_are_refused():
    with pytest.raises(ValueError, match="cannot sample a model that predicts 'v'"):
        Solver("heun_flow", 4).build(CosineProcess())
