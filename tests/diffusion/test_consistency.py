"""Consistency functions, jumps and sampling, against published numbers, diffusers and closed forms."""

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file

from foley.core.seeding import torch_generator
from foley.diffusion.consistency import Consistency, ConsistencySolver, ddim_jump
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EmbeddedGuidance, KnownLatent, extrapolate
from foley.diffusion.process import PREDICTIONS, DiffusionProcess
from foley.diffusion.sampler import Start, generate_latents, sample
from foley.diffusion.solver import CONSISTENCY, Solver
from foley.diffusion.windows import Windows

STUDENT = EmbeddedGuidance(5.0)


def process_of(prediction: str) -> DiffusionProcess:
    return DiffusionProcess(prediction, zero_terminal_snr=prediction != "epsilon")


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "audiolcm.safetensors")


def test_golden_scalings(golden):
    skip, out = Consistency().scalings(golden["scaling.t"])
    torch.testing.assert_close(skip, golden["scaling.c_skip"])
    torch.testing.assert_close(out, golden["scaling.c_out"])


def test_golden_grid(golden):
    assert torch.equal(Consistency(jump_steps=20).grid(process_of("epsilon")), golden["ddim.timesteps"])


def test_golden_guided_jump(golden):
    process, consistency = process_of("epsilon"), Consistency(jump_steps=20)
    grid, index = consistency.grid(process), golden["ddim.index"]
    scale = 1 + golden["omega"][:, None, None]
    guided = extrapolate(golden["eps_cond"], golden["eps_uncond"], scale)
    end = ddim_jump(process, golden["x_t"], guided, grid[index], consistency.jump_ends(grid)[index])
    torch.testing.assert_close(end, golden["x_prev"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_the_prediction_guides_clean_latent_and_noise(prediction):
    process, scale = process_of(prediction), 7.0
    noisy, positive, negative = torch.randn(3, 2, 4, 6, generator=torch_generator("guided"), dtype=torch.float64)
    at = torch.tensor([200, 999]) if prediction != "epsilon" else torch.tensor([200, 500])
    guided = extrapolate(positive, negative, scale)
    for estimate in (process.to_clean, process.to_noise):
        parts = [estimate(noisy, part, at) for part in (positive, negative)]
        torch.testing.assert_close(estimate(noisy, guided, at), extrapolate(*parts, scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("jump_steps", [1, 5, 10, 20, 50])
def test_every_prediction_has_a_grid_that_ends_at_pure_noise_and_jumps_to_zero(prediction, jump_steps):
    process, consistency = process_of(prediction), Consistency(jump_steps)
    grid = consistency.grid(process)
    assert len(grid) == 1000 // jump_steps
    assert grid[-1] == (1000 if process.is_flow else 999)
    ends = consistency.jump_ends(grid)
    assert ends[0] == 0
    assert torch.equal(ends[1:], grid[:-1])


def test_k_must_divide_the_schedule():
    with pytest.raises(ValueError, match="jump_steps=30 does not divide"):
        Consistency(jump_steps=30).grid(DiffusionProcess())
    with pytest.raises(ValueError, match="at least 1"):
        Consistency(jump_steps=0)
    with pytest.raises(ValueError, match="low <= high"):
        Consistency(guidance_range=[7, 5])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_function_is_the_identity_at_timestep_zero_and_the_clean_estimate_elsewhere(prediction):
    process, consistency = process_of(prediction), Consistency()
    noisy, output = torch.randn(2, 3, 4, 6, generator=torch_generator("boundary"))
    zero, later = torch.zeros(3, dtype=torch.long), torch.tensor([19, 500, 999])
    assert torch.equal(consistency.estimate(process, noisy, output, zero), noisy)
    estimate, clean = consistency.estimate(process, noisy, output, later), process.to_clean(noisy, output, later)
    torch.testing.assert_close(estimate, clean, atol=1e-4, rtol=1e-3)


def test_the_first_step_from_zero_terminal_snr():
    process, consistency = DiffusionProcess("v"), Consistency()
    noise, velocity = torch.randn(2, 1, 4, 6, generator=torch_generator("terminal"))
    last, before = torch.tensor([999]), torch.tensor([979])
    torch.testing.assert_close(consistency.estimate(process, noise, velocity, last), -velocity, atol=1e-6, rtol=0)
    jump = ddim_jump(process, noise, velocity, last, before)
    torch.testing.assert_close(jump, process.add_noise(-velocity, noise, before))


@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_sampling_is_that_of_diffusers(prediction, name, num_steps):
    process, solver = process_of(prediction), ConsistencySolver(num_steps)
    theirs = LCMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=name,
        rescale_betas_zero_snr=process.zero_terminal_snr,
        clip_sample=False,
    )
    theirs.set_timesteps(num_steps)
    results = []
    for scheduler in (solver.build(process), theirs):
        noise = torch.randn(2, 4, 6, generator=torch_generator("noise"))
        run = solver.run_context(scheduler, STUDENT, 2)
        assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
        generators = [torch_generator("fresh", item) for item in range(2)]
        results.append(sample(lambda noisy, timestep: 0.3 * noisy.cos(), noise, scheduler, run, (), generators))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_published_timesteps():
    timesteps = [ConsistencySolver(steps).build(DiffusionProcess()).timesteps.tolist() for steps in (1, 2, 4)]
    assert timesteps == [[999], [999, 499], [999, 759, 499, 259]]
    assert ConsistencySolver(2).build(DiffusionProcess("flow")).timesteps.tolist() == [1000, 500]
    with pytest.raises(ValueError, match="distilled on 50 points"):
        ConsistencySolver(51).build(DiffusionProcess())
    with pytest.raises(ValueError, match="whole number >= 1"):
        ConsistencySolver(0)


def test_the_solver_of_students_is_no_ordinary_solver():
    assert ConsistencySolver().name == CONSISTENCY
    with pytest.raises(ValueError, match="samples students only"):
        Solver(CONSISTENCY, 2).build(DiffusionProcess())


class Recorder:
    """A denoiser that remembers its calls."""

    latent_channels = 4

    def __init__(self):
        self.calls = []

    def __call__(self, noisy, timestep, context, context_mask, guidance_scale, visible=None, hidden_mask=None):
        self.calls.append((len(noisy), int(timestep[0]), guidance_scale.tolist()))
        return 0.1 * noisy + context.mean()


def generate(denoiser, prediction="v", seeds=(0, 1), num_frames=20, **options):
    text = Conditioning(torch.ones(len(seeds), 3, 2), torch.ones(len(seeds), 3, dtype=torch.bool))
    return generate_latents(
        denoiser, process_of(prediction), text, None, seeds, num_frames, STUDENT, ConsistencySolver(2), **options
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_student_is_evaluated_once_a_step_and_told_the_scale(prediction):
    denoiser = Recorder()
    both = generate(denoiser, prediction)
    last = 1000 if prediction == "flow" else 999
    assert denoiser.calls == [(2, last, [5.0]), (2, last - 500, [5.0])]
    torch.testing.assert_close(both[1:], generate(Recorder(), prediction, seeds=(1,)))


def test_windows_starts_and_known_frames_work_as_with_every_solver():
    denoiser = Recorder()
    assert generate(denoiser, windows=Windows(20, 8, 2)).shape == (2, 4, 20)
    assert denoiser.calls[0] == (6, 999, [5.0])
    clean = torch.randn(1, 4, 20)
    assert torch.equal(generate(Recorder(), start=Start(clean, 2)), clean.expand(2, -1, -1))
    denoiser = Recorder()
    generate(denoiser, start=Start(clean, 1))
    assert [call[1] for call in denoiser.calls] == [499]
    hidden = torch.arange(20)[None] > 9
    assert torch.equal(
        generate(Recorder(), known=KnownLatent(clean, hidden))[..., :10], clean[..., :10].expand(2, -1, -1)
    )


def test_a_student_is_told_omega_as_the_published_sampler_does(golden):
    """Scale 5 is w = 5, of which 4 is embedded: the least omega of the published distillation."""
    consistency = Consistency(guidance_range=(5, 13), embeds="omega")
    denoiser, text = Recorder(), Conditioning(torch.ones(2, 3, 2), torch.ones(2, 3, dtype=torch.bool))
    guidance = consistency.guidance(ClassifierFreeGuidance(5.0))
    generate_latents(denoiser, process_of("epsilon"), text, None, (0, 1), 20, guidance, ConsistencySolver(2))
    assert [call[2] for call in denoiser.calls] == [[4.0], [4.0]]
    assert guidance.scale == 5.0
    omega = golden["omega"]
    assert torch.equal(consistency.embedded(1 + omega), 1 + omega - 1)
    assert torch.equal(Consistency().embedded(1 + omega), 1 + omega)  # a student that does not say is told w
    with pytest.raises(ValueError, match="omega or scale"):
        Consistency(embeds="w")


def test_scales_outside_the_trained_range_need_leave():
    consistency = Consistency(guidance_range=(5, 13))
    assert consistency.guidance(ClassifierFreeGuidance(5.0)).scale == 5.0
    with pytest.raises(ValueError, match=r"3.0 lies outside \[5, 13\].*any_guidance_scale=true"):
        consistency.guidance(ClassifierFreeGuidance(3.0))
    assert consistency.guidance(ClassifierFreeGuidance(3.0), any_scale=True).scale == 3.0
    with pytest.raises(ValueError, match="no guidance rescale"):
        consistency.guidance(ClassifierFreeGuidance(6.0, rescale=0.7))
    assert [consistency.nearest_scale(scale) for scale in (3.0, 6.0, 20.0)] == [5, 6.0, 13]
