"""Guidance that changes on the way: closed forms, and what caches, recordings and counts make of it."""

import pytest
import torch
from recorded_graphs import RecordedGraphs
from stirring_parts import stir

from foley.accel.caching.calibration import CalibrationRecorder
from foley.accel.caching.first_block_cache import FirstBlockCache
from foley.accel.caching.fora import Fora
from foley.accel.caching.prediction import PredictionReuse
from foley.accel.caching.prediction_calibration import CovarianceRecorder
from foley.accel.caching.sensitivity import SensitivityRecorder
from foley.accel.combined import NoAcceleration
from foley.accel.cost import CostMeter
from foley.core.seeding import torch_generator
from foley.diffusion.consistency import Consistency
from foley.diffusion.context import RunContext, StepContext
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, KnownLatent
from foley.diffusion.guiders import IntervalGuidance, ProjectedGuidance
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola

STEPS = 8
MIDDLE = {"start": 0.25, "stop": 0.75}


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    model = DiffusionTransformer(4, 16, 2, 2, 6, AdaLNSola(rank=2, alpha=2)).eval()
    stir(model)  # layers that start at zero would hide the text
    return model


def text(rows, tokens=3):
    context = torch.randn(rows, tokens, 6, generator=torch_generator("text", rows, tokens))
    return Conditioning(context, torch.ones(rows, tokens, dtype=torch.bool))


def generate(denoiser, guidance, seeds=(0, 1), accelerator=None, solver="ddim", **options):
    process = DiffusionProcess("flow" if solver.endswith("flow") else "v")
    run = process, text(2).expand(2) if len(seeds) == 2 else options.pop("positive"), text(1, 2), seeds, 20, guidance
    return generate_latents(denoiser, *run, Solver(solver, STEPS), accelerator, **options)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "euler_flow"])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_apg_that_keeps_everything_is_classifier_free_guidance(denoiser, solver, rescale):
    same = ProjectedGuidance(4.0, rescale, eta=1.0, momentum=None)
    plain = generate(denoiser, ClassifierFreeGuidance(4.0, rescale), solver=solver)
    torch.testing.assert_close(generate(denoiser, same, solver=solver), plain, atol=2e-4, rtol=1e-3)


def guided(guidance, noisy, predictions, evaluations=(5,), hidden=None):
    """What the rule makes of given predictions, at these evaluations of a run in turn."""
    solver, process = Solver("ddim", STEPS), DiffusionProcess("v")
    run = solver.run_context(solver.build(process), guidance, len(noisy), process)
    denoise = guidance.follow(lambda *_: predictions, lambda: lambda *_: predictions[0], hidden)
    denoise.on_run_start(run)
    for evaluation in evaluations:
        denoise.on_evaluation_start(StepContext(evaluation, run.timesteps[evaluation], run))
        result = denoise(noisy, run.timesteps[evaluation].expand(len(noisy)))

    def clean(prediction, evaluation=evaluations[-1]):
        weights = run.clean_weights[evaluation].float()
        return weights[0] * noisy + weights[1] * prediction

    return result, clean


def drawn():
    return torch.randn(3, 2, 4, 20, generator=torch_generator("apg")).unbind()


def test_the_update_of_the_clean_estimate_is_orthogonal_to_it():
    noisy, positive, negative = drawn()
    result, clean = guided(ProjectedGuidance(4.0, momentum=None), noisy, (positive, negative))
    towards, update = clean(positive), clean(result) - clean(positive)
    difference = towards - clean(negative)
    assert (update * towards).sum(dim=(1, 2)).abs().max() < 1e-3 * update.norm() * towards.norm()
    share = (difference * towards).sum(dim=(1, 2), keepdim=True) / towards.square().sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(update, 3 * (difference - share * towards), atol=1e-4, rtol=1e-3)


def test_an_update_is_no_longer_than_its_bound_whatever_the_length_of_a_clip():
    for frames in (10, 20):
        noisy, positive, negative = (part[..., :frames] for part in drawn())
        rule = ProjectedGuidance(2.0, eta=1.0, momentum=None, largest_update=0.1)  # w - 1 = 1: the update itself
        result, clean = guided(rule, noisy, (positive, negative))
        update = clean(result) - clean(positive)
        torch.testing.assert_close(update.square().mean(dim=(1, 2)).sqrt(), torch.full((2,), 0.1), atol=1e-4, rtol=0)


def test_momentum_weighs_the_updates_before():
    noisy, positive, negative = drawn()
    rule = ProjectedGuidance(2.0, eta=1.0, momentum=-0.5)
    result, clean = guided(rule, noisy, (positive, negative), evaluations=(4, 5))
    difference = clean(positive) - clean(negative)
    before = clean(positive, 4) - clean(negative, 4)
    torch.testing.assert_close(clean(result) - clean(positive), difference - 0.5 * before, atol=1e-4, rtol=1e-3)


def test_known_frames_have_no_part_in_norms_and_projections():
    noisy, positive, negative = drawn()
    hidden = (torch.arange(20) > 6)[None]
    rule = ProjectedGuidance(4.0, eta=0.5, largest_update=0.3)
    wild = [torch.where(hidden[:, None], part, 1e3) for part in (positive, negative)]
    whole, _ = guided(rule, noisy, wild, hidden=hidden)
    alone, _ = guided(rule, noisy[..., hidden[0]], [part[..., hidden[0]] for part in (positive, negative)])
    torch.testing.assert_close(whole[..., hidden[0]], alone, atol=1e-4, rtol=1e-3)


def rows_of(denoiser, guidance, **options):
    """How many rows the denoiser is given, at each evaluation."""
    rows = []
    hook = denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        latent = generate(denoiser, guidance, **options)
    finally:
        hook.remove()
    return rows, latent


def test_outside_of_the_interval_the_positive_branch_runs_alone(denoiser):
    rule = IntervalGuidance(3.0, **MIDDLE)
    rows, latent = rows_of(denoiser, rule)
    assert rows == [2, 2, 4, 4, 4, 4, 2, 2]
    assert not torch.allclose(latent, generate(denoiser, ClassifierFreeGuidance(3.0)))
    everywhere = IntervalGuidance(3.0)
    torch.testing.assert_close(generate(denoiser, everywhere), generate(denoiser, ClassifierFreeGuidance(3.0)))
    never = IntervalGuidance(3.0, start=0.5, stop=0.51)
    torch.testing.assert_close(generate(denoiser, never), generate(denoiser, ClassifierFreeGuidance(1.0)))
    assert rows_of(denoiser, never)[0] == [2] * STEPS


@pytest.mark.parametrize("make", [NoAcceleration, lambda: PredictionReuse(interval=2), lambda: Fora(interval=2)])
def test_costs_count_the_branches_of_each_evaluation(denoiser, make):
    meters = {name: CostMeter(make()) for name in ("interval", "plain", "alone")}
    rules = {"interval": IntervalGuidance(3.0, **MIDDLE), "plain": ClassifierFreeGuidance(3.0)}
    rules["alone"] = ClassifierFreeGuidance(1.0)
    for name, meter in meters.items():
        generate(denoiser, rules[name], accelerator=meter)
    cost = {name: meter.cost_per_item() for name, meter in meters.items()}
    assert cost["plain"].macs_uncached == 2 * cost["alone"].macs_uncached
    assert cost["interval"].macs_uncached == (cost["plain"].macs_uncached + cost["alone"].macs_uncached) // 2
    if make is NoAcceleration:
        assert cost["interval"].macs_cached == cost["interval"].macs_uncached
    else:
        assert cost["interval"].macs_cached < cost["interval"].macs_uncached


ACCELERATORS = {
    "layers": lambda: Fora(interval=3),
    "blocks": lambda: FirstBlockCache(threshold=10.0),
    "predictions": lambda: PredictionReuse(interval=3),
    "measured": lambda: PredictionReuse(threshold=10.0),
}


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("rule", [IntervalGuidance(3.0, **MIDDLE), ProjectedGuidance(4.0, **MIDDLE)])
def test_what_is_kept_is_of_the_stretch_that_it_is_reused_in(denoiser, name, rule):
    """Each stretch of the run computes at its beginning, and an item ignores its batch under caches, too."""
    accelerator = ACCELERATORS[name]()
    latent = generate(denoiser, rule, accelerator=accelerator)
    if name in ("predictions", "measured"):
        computed = accelerator.computed_evaluations
        assert [computed[first] for first in (0, 2, 6)] == [True] * 3
        assert sum(computed) < STEPS
    alone = generate(
        denoiser,
        rule,
        seeds=(1,),
        accelerator=ACCELERATORS[name](),
        positive=Conditioning(text(2).context[1:], text(2).mask[1:]),
    )
    torch.testing.assert_close(latent[1:], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [lambda: None, lambda: Fora(interval=2)])
@pytest.mark.parametrize(
    "rule", [IntervalGuidance(3.0, **MIDDLE), ProjectedGuidance(4.0), ProjectedGuidance(4.0, **MIDDLE)]
)
def test_recorded_evaluations_are_those_that_run_as_they_are(denoiser, rule, make):
    recorder = RecordedGraphs()
    recorded = generate(denoiser, rule, accelerator=make(), recorder=recorder)
    assert recorder.replays > 0
    assert torch.equal(recorded, generate(denoiser, rule, accelerator=make()))


def test_an_edit_is_guided_by_its_hidden_frames(denoiser):
    visible = torch.randn(1, 4, 20, generator=torch_generator("visible"))
    known = KnownLatent(visible, (torch.arange(20) > 9)[None])
    latent = generate(denoiser, ProjectedGuidance(4.0, **MIDDLE), known=known)
    assert torch.equal(latent[..., :10], visible[..., :10].expand(2, -1, -1))


@pytest.mark.parametrize("make", [CalibrationRecorder, SensitivityRecorder, CovarianceRecorder])
def test_calibrations_are_of_guidance_throughout(denoiser, make):
    with pytest.raises(ValueError, match="guidance=default"):
        generate(denoiser, IntervalGuidance(3.0, **MIDDLE), accelerator=make())


def test_predictions_of_a_pipeline_that_ends_its_guidance_are_refused(denoiser):
    recorder = CovarianceRecorder()
    run = RunContext("published", 2, torch.tensor([9, 3]), 3.0, 0.0, batch_size=1)
    with recorder.attach(denoiser):
        recorder.on_run_start(run)
        for evaluation, rows in enumerate((2, 1)):
            recorder.on_evaluation_end(StepContext(evaluation, run.timesteps[evaluation], run), torch.ones(rows, 4, 20))
        with pytest.raises(ValueError, match="begins or ends on the way"):
            recorder.on_run_end()


def test_a_student_takes_no_rule_that_changes_on_the_way():
    with pytest.raises(ValueError, match="IntervalGuidance"):
        Consistency().guidance(IntervalGuidance(5.0, **MIDDLE))


@pytest.mark.parametrize(
    ("rule", "options", "named"),
    [
        (IntervalGuidance, {"start": 0.8, "stop": 0.2}, "guidance.start"),
        (IntervalGuidance, {"stop": 1.5}, "guidance.stop"),
        (ProjectedGuidance, {"eta": -1}, "guidance.eta"),
        (ProjectedGuidance, {"momentum": -1.5}, "guidance.momentum"),
        (ProjectedGuidance, {"largest_update": 0}, "guidance.largest_update"),
    ],
)
def test_impossible_rules_are_refused_by_name(rule, options, named):
    with pytest.raises(ValueError, match=named):
        rule(3.0, **options)


def test_a_run_that_is_not_told_of_its_steps_is_refused():
    denoise = IntervalGuidance(3.0, **MIDDLE).follow(lambda *_: None, lambda: None, None)
    with pytest.raises(RuntimeError, match="tell it the step"):
        denoise(torch.ones(1, 4, 20), torch.ones(1))
