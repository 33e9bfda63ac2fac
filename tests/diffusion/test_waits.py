"""The loop of a generation waits for no device: not for a number, a copy or a search. Counted on a pretended device."""

import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler
from pretend_device import PretendDevice

from foley.core.seeding import torch_generator
from foley.diffusion.consistency import Consistency, ConsistencySolver
from foley.diffusion.guidance import (
    ClassifierFreeGuidance,
    Conditioning,
    EmbeddedGuidance,
    EvaluationGrid,
    KnownLatent,
    extrapolate,
)
from foley.diffusion.process import PREDICTIONS, CosineProcess, DiffusionProcess
from foley.diffusion.sampler import Start, sample
from foley.diffusion.schedulers import AncestralScheduler, UniPCScheduler, combine
from foley.diffusion.solver import SOLVERS, Solver
from foley.diffusion.windows import Windows
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola

SHAPE = (2, 3, 8)


def cases():
    """Every solver with every prediction that it samples."""
    for prediction in PREDICTIONS:
        for name in SOLVERS:
            if name.endswith("flow") == (prediction == "flow"):
                yield prediction, name


def make_process(prediction):
    return DiffusionProcess(prediction, zero_terminal_snr=prediction != "epsilon")


def draw(*key):
    return torch.randn(SHAPE, generator=torch_generator(*key))


def run(solver, process, put=lambda x: x, progress=iter, known=None, start=None):
    """A generation of a made-up denoiser, in the way of an edit where `known` or `start` are given."""
    scheduler = solver.build(process)
    context = solver.run_context(scheduler, ClassifierFreeGuidance(1.0), len(draw("noise")))
    generators = [torch_generator("solver noise", seed) for seed in range(2)]

    def denoise(noisy, timestep):
        return (0.3 * noisy + 0.001 * timestep[:, None, None]).tanh()

    known = None if known is None else KnownLatent(put(draw("known")[:1]), put(torch.arange(8)[None] > 3))
    start = None if start is None else Start(put(draw("start")), start)
    return sample(denoise, put(draw("noise")), scheduler, context, (), generators, progress, start, known)


def run_pretended(solver, process, **options):
    with PretendDevice() as device:

        def begin(evaluations):
            device.waits.clear()  # what came before the loop came once
            return evaluations

        latent = device.get(run(solver, process, device.put, begin, **options))
    return latent, device.waits


@pytest.mark.parametrize(("prediction", "name"), cases())
def test_no_solver_waits_inside_its_loop(prediction, name):
    process, solver = make_process(prediction), Solver(name, 6)
    latent, waits = run_pretended(solver, process)
    assert waits == []
    torch.testing.assert_close(latent, run(solver, process))


@pytest.mark.parametrize("prediction", ["v", "epsilon", "x0"])
def test_fresh_noise_of_ddim_waits_for_nothing(prediction):
    process, solver = make_process(prediction), Solver("ddim", 6, eta=1.0)
    latent, waits = run_pretended(solver, process)
    assert waits == []
    torch.testing.assert_close(latent, run(solver, process))


@pytest.mark.parametrize("name", [name for name in SOLVERS if not name.endswith("flow")])
def test_nothing_waits_in_stable_audios_schedule(name):
    latent, waits = run_pretended(Solver(name, 6), CosineProcess(), known=True, start=2)
    assert waits == []
    torch.testing.assert_close(latent, run(Solver(name, 6), CosineProcess(), known=True, start=2))


@pytest.mark.parametrize("name", SOLVERS)
def test_no_edit_waits_for_its_noise_levels(name):
    process = make_process("flow" if name.endswith("flow") else "v")
    latent, waits = run_pretended(Solver(name, 6), process, known=True, start=2)
    assert waits == []
    torch.testing.assert_close(latent, run(Solver(name, 6), process, known=True, start=2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_student_waits_for_nothing_either(prediction):
    process, solver = make_process(prediction), ConsistencySolver(num_steps=4, consistency=Consistency())
    latent, waits = run_pretended(solver, process)
    assert waits == []
    torch.testing.assert_close(latent, run(solver, process))


@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance(3.0, 0.7), EmbeddedGuidance(5.0)])
@pytest.mark.parametrize("windowed", [False, True])
def test_guidance_windows_and_a_hoisted_denoiser_wait_for_nothing(guidance, windowed):
    torch.manual_seed(0)
    embeds = isinstance(guidance, EmbeddedGuidance)
    denoiser = DiffusionTransformer(3, 16, 2, 2, 6, AdaLNSola(rank=2, alpha=2), guidance_embedding=embeds).eval()
    for parameter in denoiser.parameters():  # none stays at its zero
        torch.nn.init.normal_(parameter, std=0.2)
    timesteps = torch.tensor([900, 500])
    windows = Windows(8, 5, 2) if windowed else None
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()

    def prepare(put):
        positive = Conditioning(put(torch.ones(2, 5, 6)), put(mask))
        known = KnownLatent(put(draw("known")[:1]), put(torch.arange(8)[None] > 3))
        grid = EvaluationGrid(put(timesteps), 8, windows)
        negative = Conditioning(put(torch.zeros(1, 2, 6)), put(mask[:1, :2]))
        return guidance.wrap(denoiser, positive, negative, known, grid)

    noisy = draw("noise")
    with torch.no_grad():
        expected = prepare(lambda x: x)(noisy, timesteps[:1].expand(2))
        with PretendDevice() as device:
            device.put_module(denoiser)
            denoise = prepare(device.put)
            there, when = device.put(noisy), device.put(timesteps)[:1].expand(2)
            device.waits.clear()
            prediction = denoise(there, when)
    assert device.waits == []
    torch.testing.assert_close(device.get(prediction), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_targets_and_weights_take_no_float64_to_a_device(prediction):
    process, consistency = make_process(prediction), Consistency()
    grid = consistency.grid(process)
    with PretendDevice() as device:  # which knows no float64
        clean, noise = device.put(draw("clean")), device.put(draw("noise"))
        timestep = grid[:2].to(device.device)
        noisy = process.add_noise(clean, noise, timestep)
        target = process.target(clean, noise, timestep)
        results = [process.to_clean(noisy, target, timestep), process.to_noise(noisy, target, timestep)]
        results += [process.min_snr_weight(timestep), process.snr(timestep)]
        results += [consistency.estimate(process, noisy, target, timestep), extrapolate(noisy, target, 3.0)]
        process.sample_timesteps(2, torch_generator("timesteps"))
        assert all(device.get(result).dtype == torch.float32 for result in results)


def scheduler_of_diffusers(kind, process):
    ours = Solver({UniPCMultistepScheduler: "unipc", DDPMScheduler: "ddpm"}[kind], 6).build(process)
    theirs = kind.from_config(ours.config)
    theirs.set_timesteps(6)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    return ours, theirs


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["v", "epsilon", "x0"])
def test_unipc_is_that_of_diffusers(prediction, order):
    config = dict(Solver("unipc", 6).build(make_process(prediction)).config) | {"solver_order": order}
    ours, theirs = UniPCScheduler.from_config(config), UniPCMultistepScheduler.from_config(config)
    latents = [draw("noise"), draw("noise")]
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for timestep in ours.timesteps:
        prediction = draw("prediction", int(timestep))
        latents = [s.step(prediction, timestep, x)[0] for s, x in zip((ours, theirs), latents, strict=True)]
        torch.testing.assert_close(latents[0], latents[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["v", "epsilon", "x0"])
def test_the_ancestral_step_is_that_of_diffusers(prediction):
    ours, theirs = scheduler_of_diffusers(DDPMScheduler, make_process(prediction))
    assert isinstance(ours, AncestralScheduler)
    for timestep in ours.timesteps:
        latent, output = draw("latent", int(timestep)), draw("output", int(timestep))
        expected = theirs.step(output, timestep, latent, generator=torch_generator("z"))[0]
        noise = torch.randn(SHAPE, generator=torch_generator("z"))
        torch.testing.assert_close(ours.step(output, timestep, latent, noise)[0], expected, atol=1e-5, rtol=1e-5)


def test_combining_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    ours, _ = scheduler_of_diffusers(DDPMScheduler, make_process("v"))
    ours.step(draw("output"), ours.timesteps[0], draw("latent"), draw("noise"))
    assert torch.equal(torch.rand(()), expected)
    assert torch.equal(combine(lambda x, y: 2 * x - y, torch.ones(SHAPE), torch.ones(SHAPE)), torch.ones(SHAPE))
