"""Recorded evaluations give what evaluations one by one give: on a recorder of the CPU with the contract of CUDA's."""

import logging
from collections import Counter

import pytest
import torch
from recorded_graphs import RecordedGraphs
from stirring_parts import stir

from foley.accel.attention.local_global import LocalGlobal
from foley.accel.caching.fora import Fora
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.cost import CostMeter
from foley.diffusion.graphs import RecordedDenoise, choose_graphs
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EmbeddedGuidance, KnownLatent
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.diffusion.windows import Windows
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola

CHANNELS, FRAMES, CONTEXT_DIM = 4, 12, 6


def make_denoiser(**options):
    torch.manual_seed(0)
    model = DiffusionTransformer(CHANNELS, 16, 4, 2, CONTEXT_DIM, AdaLNSola(rank=2, alpha=2), **options)
    stir(model)
    return model.eval()


def generate(recorder=None, accelerator=None, solver="ddim", num_steps=8, guidance=None, eta=0.0, **options):
    guidance = guidance or ClassifierFreeGuidance(3.0, 0.5)
    denoiser = make_denoiser(guidance_embedding=isinstance(guidance, EmbeddedGuidance))
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 0]]).bool()
    positive, negative = (Conditioning(torch.randn(1, 3, CONTEXT_DIM, generator=generator), mask) for _ in "ab")
    process, prediction = DiffusionProcess("x0"), Solver(solver, num_steps, eta=eta)
    return generate_latents(
        denoiser,
        process,
        positive.expand(2),
        negative,
        [0, 1],
        FRAMES,
        guidance,
        prediction,
        accelerator,
        recorder=recorder,
        **options,
    )


def known():
    return KnownLatent(torch.randn(1, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(2)), mask_of_half())


def mask_of_half():
    return torch.arange(FRAMES)[None] > 5


OPTIONS = {
    "guided": {},
    "student": {"guidance": EmbeddedGuidance(5.0)},
    "edit": {"known": known()},
    "windows": {"windows": Windows(FRAMES, 8, 4)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_recording_serves_all_timesteps(name):
    recorder = RecordedGraphs()
    recorded = generate(recorder, **OPTIONS[name])
    assert (recorder.count, recorder.replays) == (1, 7)  # the first of 8 evaluations runs as it is
    torch.testing.assert_close(recorded, generate(**OPTIONS[name]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("solver", ["ddpm", "euler", "heun", "dpmpp_3m", "dpmpp_2m_sde", "unipc"])
def test_solvers_may_keep_predictions(solver):
    """They are given x0 itself here, which some keep for several steps."""
    recorder = RecordedGraphs()
    torch.testing.assert_close(generate(recorder, solver=solver), generate(solver=solver), atol=1e-5, rtol=1e-5)
    assert recorder.count == 1


@pytest.mark.parametrize("accelerator", [None, Fora(3)])
def test_fresh_noise_is_drawn_outside_of_recordings(accelerator):
    recorder = RecordedGraphs()
    recorded = generate(recorder, accelerator, num_steps=10, eta=1.0)
    torch.testing.assert_close(recorded, generate(None, accelerator, num_steps=10, eta=1.0), atol=1e-6, rtol=1e-6)
    assert recorder.replays == (9 if accelerator is None else 8)


CACHES = {
    "none": NoAcceleration,
    "cache": lambda: Fora(3),
    "metered cache": lambda: CostMeter(Fora(3)),
    "combined": lambda: Combined([Fora(3), NoAcceleration()]),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_one_recording_for_each_pattern_of_its_schedule(name):
    recorder = RecordedGraphs()
    recorded = generate(recorder, CACHES[name](), num_steps=10)
    torch.testing.assert_close(recorded, generate(None, CACHES[name](), num_steps=10), atol=1e-6, rtol=1e-6)
    assert recorder.count == (1 if name == "none" else 2)  # all compute, or all are reused
    assert recorder.replays == 10 - recorder.count


def test_every_pattern_of_a_mixed_schedule_reads_what_was_computed_last():
    """Layers of different kinds compute at different evaluations, so that three patterns take turns."""
    intervals = {"self_attention": 2, "cross_attention": 3, "feed_forward": 1}

    class Mixed(Fora):
        def schedule_for(self, run, denoiser):
            schedule = super().schedule_for(run, denoiser)
            for column, name in enumerate(schedule.layer_names):
                interval = intervals[name.rpartition(".")[2]]
                schedule.compute[:, column] = torch.arange(len(schedule.compute)) % interval == 0
            return schedule

    recorder = RecordedGraphs()
    recorded = generate(recorder, Mixed(2), num_steps=24)
    torch.testing.assert_close(recorded, generate(None, Mixed(2), num_steps=24), atol=1e-6, rtol=1e-6)
    assert recorder.count == 4  # both, either or neither attention computes


@pytest.mark.parametrize(
    ("accelerator", "fails", "reason"),
    [
        (lambda: Fora(3, "taylor"), "", "evaluations under this accelerator are not alike"),
        (lambda: LocalGlobal(window_frames=3, ratio=0.2), "", "not alike"),
        (lambda: Combined([Fora(3), LocalGlobal(window_frames=3)]), "", "not alike"),
        (NoAcceleration, "operation not permitted\nwhen capturing", "operation not permitted"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why_once(accelerator, fails, reason, caplog):
    recorder = RecordedGraphs(fails)
    with caplog.at_level(logging.INFO):
        latent = generate(recorder, accelerator())
    assert torch.equal(latent, generate(None, accelerator()))
    messages = Counter(record.message for record in caplog.records if "no CUDA graphs" in record.message)
    assert [count for message, count in messages.items() if reason in message] == [1]
    assert recorder.replays == 0


def test_runs_of_few_evaluations_are_not_recorded():
    recorder = RecordedGraphs()
    generate(recorder, num_steps=3)
    assert recorder.count == 0


def test_the_recorder_of_the_tests_shows_what_a_stale_buffer_does():
    """Numbers of Python stay as they were, and tensors that are replaced stay those of the recording."""
    state = {"calls": 0, "kept": torch.zeros(1)}

    def denoise(noisy, timestep):
        state["calls"] += 1
        result = noisy + state["kept"] + state["calls"]
        state["kept"] = result.mean().reshape(1)
        return result

    recorded = RecordedDenoise(denoise, RecordedGraphs(), lambda: "one")
    noisy, timestep = torch.ones(1, 1, 2), torch.tensor([3])
    results = [recorded(noisy, timestep) for _ in range(4)]
    assert torch.equal(results[2], results[3])  # neither a call of Python nor a new tensor is seen


@pytest.mark.parametrize(
    ("wanted", "device", "chosen"), [("auto", "cuda", True), ("auto", "cpu", False), (False, "cuda", False)]
)
def test_graphs_are_chosen_where_there_is_cuda(wanted, device, chosen):
    assert choose_graphs(wanted, torch.device(device)) is chosen


@pytest.mark.parametrize(
    ("wanted", "message"), [(True, "cuda_graphs=true: device=cpu has none"), ("always", "got 'always'")]
)
def test_impossible_graphs_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        choose_graphs(wanted, torch.device("cpu"))
