"""Solvers against a case that is known in closed form: data drawn from one Gaussian."""

import json

import pytest
import torch
from safetensors import safe_open

from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EvaluationGrid, KnownLatent
from foley.diffusion.process import CosineProcess, DiffusionProcess
from foley.diffusion.sampler import Start, sample
from foley.diffusion.solver import SOLVERS, Solver

MEAN, STD = 0.7, 0.5
FLOW = ("euler_flow", "heun_flow")
CONDITIONAL = ClassifierFreeGuidance(1.0)


def levels(process, timestep):
    """Signal and noise level `[B, 1, 1]` of what a solver gives the denoiser at `timestep` `[B]`."""
    if process.is_flow:
        alpha, sigma = process.levels(timestep)
    else:
        # Heun's fractional timesteps: interpolate sigma as diffusers does.
        power = process.alphas_cumprod.clamp(min=2**-24)
        sigmas = ((1 - power) / power).sqrt()
        low = timestep.long()
        ratio = torch.lerp(sigmas[low], sigmas[(low + 1).clamp(max=999)], timestep.double() - low)
        alpha = (1 + ratio.square()).rsqrt()
        alpha, sigma = alpha.float(), (alpha * ratio).float()
    return alpha[:, None, None], sigma[:, None, None]


def optimal_denoiser(process: DiffusionProcess):
    """The exact prediction when every latent value is normal with MEAN and STD."""

    def denoise(noisy, timestep):
        alpha, sigma = levels(process, timestep)
        clean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (noisy - alpha * MEAN)
        noise = (noisy - alpha * clean) / sigma
        return {"v": alpha * noise - sigma * clean, "flow": noise - clean, "x0": clean}[process.prediction]

    return denoise


def run(process, solver, denoise=None, callbacks=(), frames=4000, seeds=(0, 1), start=None, known=None):
    scheduler = solver.build(process)
    noise = torch.stack([torch.randn(4, frames, generator=torch_generator("noise", seed)) for seed in seeds])
    generators = [torch_generator("solver", seed) for seed in seeds]
    context = solver.run_context(scheduler, CONDITIONAL, len(seeds))
    denoise = denoise or optimal_denoiser(process)
    return sample(denoise, noise, scheduler, context, callbacks, generators, start=start, known=known)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_reaches_the_data_distribution_from_zero_snr(name):
    process = DiffusionProcess("flow" if name in FLOW else "v")
    out = run(process, Solver(name, 40))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "heun_flow"])
def test_second_order_beats_first_order(name):
    first = "euler_flow" if name in FLOW else "ddim"
    process = DiffusionProcess("flow" if name in FLOW else "v")
    error = {solver: abs(run(process, Solver(solver, 20)).std().item() - STD) for solver in (name, first)}
    assert error[name] < error[first]


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m_sde", "euler_flow"])
def test_an_item_does_not_depend_on_its_batch(name):
    process = DiffusionProcess("flow" if name in FLOW else "v")
    both = run(process, Solver(name, 5), frames=30, seeds=(3, 4))
    alone = run(process, Solver(name, 5), frames=30, seeds=(4,))
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=0)


class Recorder:
    def __init__(self):
        self.events, self.timesteps, self.run = [], [], None
        self.evaluations = []

    def on_run_start(self, run):
        self.run = run
        self.events.append("start")

    def on_evaluation_start(self, context):
        self.evaluations.append(context.evaluation)
        self.timesteps.append(float(context.timestep))

    def on_evaluation_end(self, context, prediction):
        self.events.append(context.evaluation)

    def on_run_end(self):
        self.events.append("end")


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 4), ("heun", 7), ("dpmpp_2m", 4)])
def test_callbacks_hear_of_every_evaluation(name, evaluations):
    recorder = Recorder()
    run(DiffusionProcess(), Solver(name, 4), callbacks=[recorder], frames=10)
    assert recorder.events == ["start", *range(evaluations), "end"]
    assert recorder.run.num_evaluations == evaluations
    assert recorder.evaluations == list(range(evaluations))
    assert recorder.timesteps == [float(t) for t in recorder.run.timesteps]
    assert recorder.timesteps == sorted(recorder.timesteps, reverse=True)


def data(frames=4000):
    return MEAN + STD * torch.randn(1, 4, frames, generator=torch_generator("data"))


def process_of(name):
    return DiffusionProcess("flow" if name in FLOW else "v")


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_is_noised_to_the_level_of_its_own_step(name):
    process, clean, first, inputs = process_of(name), data(30), 3, []

    def denoise(noisy, timestep):
        inputs.append((noisy, timestep))
        return optimal_denoiser(process)(noisy, timestep)

    recorder = Recorder()
    run(process, Solver(name, 8), denoise, [recorder], frames=30, start=Start(clean, first))
    alpha, sigma = levels(process, inputs[0][1])
    noise = torch.stack([torch.randn(4, 30, generator=torch_generator("noise", seed)) for seed in (0, 1)])
    torch.testing.assert_close(inputs[0][0], alpha * clean + sigma * noise, atol=2e-3, rtol=0)
    total = recorder.run.num_evaluations
    assert recorder.evaluations == list(range(2 * first if total == 15 else first, total))
    assert recorder.timesteps == [float(t) for t in recorder.run.timesteps[recorder.evaluations[0] :]]


@pytest.mark.parametrize("name", SOLVERS)
def test_known_frames_are_noised_data_at_every_evaluation_and_come_back(name):
    process, clean, hidden = process_of(name), data(30), torch.arange(30)[None] >= 10
    noise = torch.stack([torch.randn(4, 30, generator=torch_generator("noise", seed)) for seed in (0, 1)])

    def denoise(noisy, timestep):
        alpha, sigma = levels(process, timestep)
        expected = alpha * clean + sigma * noise
        torch.testing.assert_close(noisy[..., :10], expected[..., :10], atol=2e-3, rtol=0)
        prediction = optimal_denoiser(process)(noisy, timestep)
        return torch.where(hidden[:, None], prediction, 1e3)

    out = run(process, Solver(name, 6), denoise, frames=30, known=KnownLatent(clean, hidden))
    assert torch.equal(out[..., :10], clean[..., :10].expand(2, -1, -1))
    plain = run(process, Solver(name, 6), frames=30)
    torch.testing.assert_close(out[..., 10:], plain[..., 10:])


@pytest.mark.parametrize("name", SOLVERS)
def test_data_noised_part_of_the_way_come_back_as_data(name):
    out = run(process_of(name), Solver(name, 40), start=Start(data(), 20))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_ends_of_a_start_are_plain_sampling_and_the_start_itself(name):
    process, solver, clean = process_of(name), Solver(name, 5), data(30)
    plain = run(process, solver, frames=30)
    assert torch.equal(run(process, solver, frames=30, start=Start(clean, 0)), plain)
    assert torch.equal(run(process, solver, frames=30, start=Start(clean, 5)), clean.expand(2, -1, -1))


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("num_steps", [25, 30, 50, 100])
def test_ddim_at_eta_1_is_ddpm_and_finite_in_float32(prediction, num_steps):
    """With zero terminal SNR, where the library's own step at eta 1 takes the root of a negative number."""
    process = DiffusionProcess(prediction)
    out = run(process, Solver("ddim", num_steps, eta=1.0), frames=300)
    assert out.isfinite().all()
    torch.testing.assert_close(out, run(process, Solver("ddpm", num_steps), frames=300), atol=5e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_of_ddim_is_equation_12(eta):
    """In float64, beside the clean end, in the middle and at pure noise."""
    process = DiffusionProcess("v")
    power = process.alphas_cumprod
    clean, noise, fresh = (torch.randn(2, 4, 30, generator=torch_generator(name)) for name in ("x", "e", "z"))
    for now, later in ((999, 499), (499, 249), (249, 99)):
        scheduler = Solver("ddim", 10, eta=eta).build(process)
        scheduler.timesteps = torch.tensor([now, later])
        step = torch.tensor([now]).expand(2)
        noisy = process.add_noise(clean, noise, step)
        actual = scheduler.step(process.target(clean, noise, step), torch.tensor(now), noisy, fresh)[0]
        before, after = power[now], power[later]
        variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)  # equation 16
        kept = (1 - after - variance).clamp(min=0).sqrt()
        expected = after.sqrt() * clean + kept * noise + variance.sqrt() * fresh
        torch.testing.assert_close(actual, expected.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_fresh_noise_reaches_the_data_and_keeps_items_apart(eta):
    process, solver = DiffusionProcess("v"), Solver("ddim", 40, eta=eta)
    out = run(process, solver)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.15)
    torch.testing.assert_close(run(process, solver, seeds=(1,)), out[1:], atol=1e-6, rtol=0)
    assert not torch.allclose(out, run(process, Solver("ddim", 40)), atol=0.1)


def test_ddim_with_fresh_noise_edits_and_varies():
    process, solver, clean = DiffusionProcess("v"), Solver("ddim", 8, eta=1.0), data(30)
    hidden = torch.arange(30)[None] >= 10
    edited = run(process, solver, frames=30, known=KnownLatent(clean, hidden))
    assert torch.equal(edited[..., :10], clean[..., :10].expand(2, -1, -1))
    assert torch.equal(run(process, solver, frames=30, start=Start(clean, 0)), run(process, solver, frames=30))
    assert torch.equal(run(process, solver, frames=30, start=Start(clean, 8)), clean.expand(2, -1, -1))
    recorder = Recorder()
    run(process, solver, callbacks=[recorder], frames=30, start=Start(clean, 3))
    assert (recorder.run.solver, recorder.evaluations) == ("ddim_eta1", list(range(3, 8)))


@pytest.mark.parametrize(("name", "eta", "message"), [("ddim", 1.2, "eta=1.2: give"), ("heun", 0.5, "'ddim' alone")])
def test_an_impossible_eta_is_refused(name, eta, message):
    with pytest.raises(ValueError, match=message):
        Solver(name, 10, eta=eta)


def test_run_end_follows_an_error():
    def fails(noisy, timestep):
        raise RuntimeError("out of memory")

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(DiffusionProcess(), Solver("ddim", 4), denoise=fails, callbacks=[recorder], frames=10)
    assert recorder.events == ["start", "end"]


def test_trailing_spacing_starts_at_the_noisiest_timestep():
    assert Solver("ddim", 4).build(DiffusionProcess()).timesteps.tolist() == [999, 749, 499, 249]
    assert Solver("euler_flow", 4).build(DiffusionProcess("flow")).timesteps.tolist() == [1000, 750, 500, 250]


@pytest.mark.parametrize(("prediction", "name"), [("v", "euler_flow"), ("flow", "ddim"), ("x0", "heun_flow")])
def test_solver_and_prediction_must_fit(prediction, name):
    with pytest.raises(ValueError, match="cannot sample a model that predicts"):
        Solver(name, 10).build(DiffusionProcess(prediction))


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="whole number >= 1"):
        Solver("ddim", steps)


def test_step_counts_beyond_the_schedule_are_refused():
    with pytest.raises(ValueError, match="1001 solver steps"):
        Solver("ddim", 1001).build(DiffusionProcess())
    with pytest.raises(ValueError, match="one step more or less"):
        Solver("ddim", 463).build(DiffusionProcess())


def test_unknown_solvers_are_refused():
    with pytest.raises(ValueError, match="dpmpp_2m"):
        Solver("magic")


@pytest.mark.parametrize("hoisted", [False, True])
def test_golden_guided_ddim(shared, hoisted):
    """Ten guided steps of the published implementation, weights and all; what steps share may be computed once."""
    from foley.system.convert.ezaudio import ezaudio_denoiser

    with safe_open(shared / "golden" / "ezaudio_dit_tiny.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    process, solver, guidance = DiffusionProcess("v"), Solver("ddim", 10), ClassifierFreeGuidance(5.0, 0.75)
    scheduler = solver.build(process)
    assert torch.equal(scheduler.timesteps, tensors["sample.timesteps"])
    positive = Conditioning(tensors["in.context"][:1], tensors["in.context_mask"][:1])
    negative = Conditioning(tensors["sample.uncond"], tensors["sample.uncond_mask"])
    noise = tensors["sample.noise"]
    grid = EvaluationGrid(scheduler.timesteps, noise.shape[-1]) if hoisted else None
    denoise = guidance.wrap(ezaudio_denoiser(weights, config), positive, negative, grid=grid)
    latents = sample(denoise, noise, scheduler, solver.run_context(scheduler, guidance, 1))
    torch.testing.assert_close(latents, tensors["sample.latents"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 6, 8, 9, 10, 25])
def test_no_step_of_heun_divides_sigma_by_more_than_its_correction_bears(num_steps):
    process = DiffusionProcess("v")
    sigmas = Solver("heun", num_steps).build(process).sigmas[:-1].unique().flip(0)  # the last, 0, is left out
    assert len(sigmas) == num_steps
    assert float((sigmas[:-1] / sigmas[1:]).max()) < 4.51
    smallest = ((1 - process.alphas_cumprod[0]) / process.alphas_cumprod[0]).sqrt()
    assert (num_steps >= 10) == (float(sigmas[-1]) == pytest.approx(float(smallest), rel=1e-2))


STOCHASTIC = [("ddpm", 0.0), ("ddim", 1.0), ("dpmpp_2m_sde", 0.0), ("dpmpp_3m_sde", 0.0)]


@pytest.mark.parametrize(("name", "eta"), STOCHASTIC)
def test_runs_that_share_their_noise_by_time_meet_wherever_both_evaluate(name, eta):
    """Where the clean latent is always thought to be zero, the latent is noise alone: one path, however many steps."""
    process, seen = DiffusionProcess("x0"), {}
    for steps in (24, 10, 4):  # 10 steps lie between the others'
        path = seen[steps] = {}

        def denoise(noisy, timestep, path=path):
            path[int(timestep[0])] = noisy
            return torch.zeros_like(noisy)

        run(process, Solver(name, steps, eta=eta, shared_with=(24, 10, 4)), denoise, frames=50)
    for coarse, fine in ((4, 24), (10, 4), (10, 24)):
        common = sorted(set(seen[coarse]) & set(seen[fine]))
        assert len(common) >= 2
        for timestep in common:
            torch.testing.assert_close(seen[coarse][timestep], seen[fine][timestep], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("process", [DiffusionProcess("v"), CosineProcess()], ids=["v", "cosine"])
def test_shared_noise_is_standard_normal_and_as_many_draws_for_all(process):
    runs = [Solver("dpmpp_2m_sde", steps, shared_with=(9, 5)).build(process) for steps in (9, 5, 7)]
    for scheduler in runs:
        totals = [sum(weight**2 for weight in step) for step in scheduler.noise_weights]
        assert totals == pytest.approx([1.0] * len(scheduler.timesteps))
    nine, five, _ = ([len(step) for step in scheduler.noise_weights] for scheduler in runs)
    assert sum(nine) == sum(five)


def test_noise_is_shared_only_where_it_is_asked_for():
    process = DiffusionProcess("v")
    assert not hasattr(Solver("ddpm", 4).build(process), "noise_weights")
    assert not hasattr(Solver("ddim", 4, shared_with=(8,)).build(process), "noise_weights")  # which adds none


def test_fewer_steps_of_the_same_noise_are_near_the_fine_run():
    process, shared = DiffusionProcess("v"), (60, 20)
    fine, coarse = (run(process, Solver("ddpm", steps, shared_with=shared), frames=200) for steps in shared)
    other = run(process, Solver("ddpm", 20), frames=200)
    assert (coarse - fine).norm() < 0.5 * (other - fine).norm()
