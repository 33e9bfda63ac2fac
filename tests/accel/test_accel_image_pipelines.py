"""Image and video pipelines of diffusers: evaluations in each way of guidance, four lines, threads, compilation."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CosineDPMSolverMultistepScheduler, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_image_pipelines import PIPELINES, STEPS, generate, image_pipeline
from tiny_transformers import transformer
from torch import nn
from torch._dynamo.testing import CompileCounter

from foley.accel import Calibration, CostMeter, Fora, PredictionReuse, accelerate, calibrate
from foley.accel.caching.prediction_calibration import CovarianceRecorder
from foley.accel.combined import NoAcceleration
from foley.accel.diffusers.pipelines import _adds_noise, _clean_weights, _items, _log_snr, accelerated
from foley.accel.layers import find_cacheable_layers
from foley.core.hashing import hash_module
from foley.diffusion.context import RunContext, StepContext

QUICK = ("sd3", "wan")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PIPELINES]
)
BRANCHES = {"flux": ["cond"], "flux_true_cfg": ["cond", "uncond"], "wan": ["cond", "uncond"]}  # joint otherwise
SCALES = {"flux": 3.5, "flux_true_cfg": 3.5, "sd3": 7.0, "dit": 4.0, "pixart": 4.5, "wan": 5.0, "cogvideox": 6.0}


class Watcher(NoAcceleration):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.runs: list[RunContext] = []

    def on_run_start(self, run: RunContext) -> None:
        self.runs.append(run)

    def on_evaluation_start(self, context: StepContext) -> None:
        assert context.timestep == context.run.timesteps[context.evaluation]
        self.calls.append((context.evaluation, context.branch))


def _counted(model: nn.Module) -> Counter[str]:
    """How often each cacheable layer really runs: a product inside of it, where it has one."""
    runs: Counter[str] = Counter()
    for layer in find_cacheable_layers(model):
        replaced = (layer.module, *layer.parts)  # are called even where they are reused
        inside = [part for module in replaced for part in module.modules() if part not in replaced]
        part = next(part for part in inside if isinstance(part, nn.Linear))
        part.register_forward_hook(lambda *_, name=layer.name: runs.update([name]))
    return runs


@EACH
def test_every_pipeline_tells_of_its_evaluations_and_is_cached_and_restored(name: str) -> None:
    pipeline, call = image_pipeline(name)
    plain, signature = generate(pipeline, call), hash_module(pipeline.transformer)
    with accelerate(pipeline, Watcher()) as (watcher,):
        assert torch.equal(generate(pipeline, call), plain)
    branches = BRANCHES.get(name, ["joint"])
    assert watcher.calls == [(evaluation, branch) for evaluation in range(STEPS) for branch in branches]
    run = watcher.runs[0]
    assert (run.batch_size, run.num_steps, run.guidance_scale) == (2, STEPS, SCALES[name])
    assert run.axis("angle") == sorted(run.axis("angle"), reverse=True)
    runs = _counted(pipeline.transformer)
    with accelerate(pipeline, "fora", interval=2):
        cached = generate(pipeline, call)
    assert set(runs.values()) == {STEPS // 2 * len(branches)}
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    assert torch.equal(generate(pipeline, call), plain)
    assert hash_module(pipeline.transformer) == signature
    assert not {"forward", "cache_context"} & set(vars(pipeline.transformer))


@EACH
def test_every_pipeline_is_calibrated_and_cached_by_its_curves(name: str, tmp_path: Path) -> None:
    pipeline, call = image_pipeline(name)
    plain = generate(pipeline, call)
    with calibrate(pipeline, tmp_path):
        assert torch.equal(generate(pipeline, call), plain)
    calibration = Calibration.load(tmp_path / f"{type(pipeline.scheduler).__name__}_{STEPS}")
    assert calibration.num_prompts == 2
    assert (calibration.mean[:, 0, 1:] > 0).all()
    assert 0 < sum(calibration.macs.layers.values()) < calibration.macs.total
    with accelerate(pipeline, "audiocache", calibration_dir=tmp_path, threshold=0.0):
        assert torch.equal(generate(pipeline, call), plain)
    runs = _counted(pipeline.transformer)
    with accelerate(pipeline, "audiocache", calibration_dir=tmp_path, threshold=1e9, reuse="taylor"):
        assert not torch.equal(generate(pipeline, call), plain)
    assert set(runs.values()) == {len(BRANCHES.get(name, ["joint"]))}


@EACH
def test_every_pipeline_reuses_predictions(name: str) -> None:
    pipeline, call = image_pipeline(name)
    plain, runs = generate(pipeline, call), _counted(pipeline.transformer)
    with accelerate(pipeline, PredictionReuse(interval=1)):
        assert torch.equal(generate(pipeline, call), plain)
    runs.clear()
    with accelerate(pipeline, PredictionReuse(interval=2)) as (reuse,):
        reused = generate(pipeline, call)
    assert set(runs.values()) == {sum(reuse.computed_evaluations) * len(BRANCHES.get(name, ["joint"]))}
    assert sum(reuse.computed_evaluations) < STEPS
    assert reused.isfinite().all()
    assert torch.equal(generate(pipeline, call), plain)


def test_a_batch_of_equal_parts_is_joint_guidance() -> None:
    latents = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for batch, items in ((latents, 3), (latents.repeat(2, 1), 3), (latents.repeat(3, 1), 3), (latents[:1], 1)):
        assert _items(batch) == items


def test_noise_levels_are_those_of_the_scheduler() -> None:
    flow, ddim = FlowMatchEulerDiscreteScheduler(), DDIMScheduler()
    for scheduler in (flow, ddim):
        scheduler.set_timesteps(5)
    sigmas = flow.sigmas[:-1].double()
    torch.testing.assert_close(_log_snr(flow), 2 * torch.log((1 - sigmas) / sigmas), atol=1e-4, rtol=0)
    signal = ddim.alphas_cumprod[ddim.timesteps].double()
    torch.testing.assert_close(_log_snr(ddim), torch.log(signal / (1 - signal)))


def test_the_clean_latent_follows_from_what_a_denoiser_is_given_and_says() -> None:
    ddpm, cosine = DDPMScheduler(), CosineDPMSolverMultistepScheduler(sigma_data=1.0)
    clean, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    for scheduler in (ddpm, cosine):
        scheduler.set_timesteps(5)
        log_snr = _log_snr(scheduler)
        assert log_snr is not None
        alpha, sigma = (level.sqrt()[:, None] for level in (log_snr.sigmoid(), (-log_snr).sigmoid()))
        noisy, prediction = alpha * clean + sigma * noise, noise if scheduler is ddpm else alpha * noise - sigma * clean
        of_noisy, of_prediction = _clean_weights(scheduler, log_snr).T[:, :, None]
        torch.testing.assert_close(of_noisy * noisy + of_prediction * prediction, clean)
        assert _adds_noise(scheduler)
    scaled = cosine.precondition_inputs(clean + cosine.sigmas[:5, None] * noise, cosine.sigmas[:5, None])
    torch.testing.assert_close(scaled.double(), noisy, rtol=1e-4, atol=1e-4)
    assert not _adds_noise(DDIMScheduler())


class Scaled(nn.Module):
    """A denoiser that is given its time as pipelines like to scale it."""

    def forward(self, hidden_states: torch.Tensor, text: None, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (0.1 * hidden_states,)


@pytest.mark.parametrize("scale", [lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: (t / 1000).bfloat16()])
@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_a_scaled_timestep_is_found(scheduler: Any, scale: Any) -> None:
    denoiser, latent, watcher = Scaled(), torch.randn(1, 4, 8), Watcher()
    scheduler.set_timesteps(7)
    with accelerated(denoiser, scheduler, 1.0, watcher):
        for timestep in scheduler.timesteps:
            latent = scheduler.step(denoiser(latent, None, scale(timestep))[0], timestep, latent).prev_sample
    assert watcher.calls == [(evaluation, "joint") for evaluation in range(7)]


class Linear(nn.Module):
    """Of rows `[4, 8]`, 256 MACs each; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self.linear(hidden_states) * torch.cos(timestep)
        return output


@torch.no_grad()
def _sampled(accelerator: Any, rows: list[list[int]]) -> int:
    """The calls of a run in which evaluation e calls the denoiser once for each of `rows[e]`, with as many rows."""
    torch.manual_seed(0)
    denoiser, latent, scheduler = Linear(), torch.randn(1, 4, 8), FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(len(rows))
    with accelerated(denoiser, scheduler, 1.0, accelerator):
        for timestep, calls in zip(scheduler.timesteps, rows, strict=True):
            velocity = [denoiser(latent.expand(count, -1, -1), timestep)[:1] for count in calls][-1]
            latent = scheduler.step(velocity, timestep, latent).prev_sample
    assert latent.isfinite().all()
    return denoiser.calls


def test_branches_one_after_the_other_are_skipped_counted_and_calibrated_together() -> None:
    apart = [[1, 1]] * 8
    meter = CostMeter(reuse := PredictionReuse(interval=3))
    assert _sampled(meter, apart) == 2 * sum(reuse.computed_evaluations) < 16
    assert meter.describe()["macs_uncached"] == 8 * 2 * 256
    recorder = CovarianceRecorder()
    _sampled(recorder, apart)
    assert recorder.calibration().num_prompts == 2


def test_what_cannot_be_accelerated_is_said_with_what_there_is() -> None:
    pipeline, _ = image_pipeline("wan")
    for name, options, message in (
        ("forra", {}, "no accelerator is called 'forra'; there are .*fora"),
        ("fora", {"threshold": 1}, "fora has no option 'threshold'; it has .*interval"),
        ("audiocache", {}, "wants calibration_dir=FOLDER"),
        (Fora(2), {"interval": 3}, "made already"),
    ):
        with pytest.raises(ValueError, match=message), accelerate(pipeline, name, **options):
            pass
    pipeline.register_modules(transformer_2=transformer("wan"))
    with pytest.raises(ValueError, match=r"several denoisers \(transformer, transformer_2\)"), calibrate(pipeline, "x"):
        pass
    pipeline.register_modules(transformer=None, transformer_2=None)
    with pytest.raises(ValueError, match="WanPipeline has no denoiser called transformer or unet among"):
        accelerate(pipeline, "fora").__enter__()


def test_each_of_two_denoisers_has_a_run_of_its_own() -> None:
    pipeline, call = image_pipeline("wan")
    pipeline.register_modules(transformer_2=transformer("wan"))
    pipeline.register_to_config(boundary_ratio=0.9)
    with accelerate(pipeline, Watcher()) as watchers:
        generate(pipeline, call)
    evaluations = [sorted({evaluation for evaluation, _ in watcher.calls}) for watcher in watchers]
    assert all(evaluations)
    assert evaluations[0] + evaluations[1] == list(range(STEPS))
    with accelerate(pipeline, "fora", interval=2) as caches:
        assert generate(pipeline, call).isfinite().all()
    assert caches[0] is not caches[1]


def test_threads_take_turns_and_a_foreign_one_is_refused() -> None:
    """Two pipelines that share a transformer, each with its own scheduler."""
    pipelines = [image_pipeline("sd3")[0] for _ in range(2)]
    call = image_pipeline("sd3")[1]
    pipelines[1].transformer = pipelines[0].transformer

    def made(index: int) -> torch.Tensor:
        with accelerate(pipelines[index], "fora", interval=2 + index):
            return generate(pipelines[index], call)

    alone = [made(index) for index in range(2)]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(*pair) for pair in zip(alone, pool.map(made, range(2)), strict=True))
        with (
            accelerate(pipelines[0], "fora", interval=2),
            pytest.raises(RuntimeError, match="is accelerated in thread"),
        ):
            pool.submit(generate, pipelines[1], call).result()
    with (
        accelerate(pipelines[0], Watcher()),
        pytest.raises(RuntimeError, match="accelerated already"),
        accelerate(pipelines[1], Watcher()),
    ):
        pass


def _in_place(pipeline: Any, backend: Any) -> None:
    pipeline.transformer.compile(backend=backend)


def _wrapped(pipeline: Any, backend: Any) -> None:
    pipeline.transformer = torch.compile(pipeline.transformer, backend=backend)


def _cached(pipeline: Any, call: Any, directory: Path, counter: CompileCounter) -> tuple[list[torch.Tensor], list[int]]:
    """What two policies give, and the graphs compiled so far after each."""
    made, graphs = [], []
    for name, options in (
        ("fora", {"interval": 2, "reuse": "taylor"}),
        ("audiocache", {"calibration_dir": directory, "threshold": 0.1}),
    ):
        with accelerate(pipeline, name, **options):
            made.append(generate(pipeline, call))
        graphs.append(counter.frame_count)
    return made, graphs


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [_in_place, _wrapped])
def test_the_graphs_of_a_compiled_model_depend_neither_on_steps_nor_on_the_schedule(
    compile_it: Any, tmp_path: Path
) -> None:
    """And calibrations of the plain model hold for it, bit for bit."""
    graphs: list[int] = []
    for steps in (4, 8):
        torch._dynamo.reset()
        pipeline, call = image_pipeline("sd3")
        call, counter = {**call, "num_inference_steps": steps}, CompileCounter()
        with calibrate(pipeline, tmp_path):
            generate(pipeline, call)
        (plain, _), signature = _cached(pipeline, call, tmp_path, counter), hash_module(pipeline.transformer)
        compile_it(pipeline, counter)
        assert hash_module(pipeline.transformer) == signature
        compiled, counts = _cached(pipeline, call, tmp_path, counter)
        assert all(torch.equal(*pair) for pair in zip(plain, compiled, strict=True))
        with calibrate(pipeline, tmp_path):
            generate(pipeline, call)
        graphs += [*counts, counter.frame_count]  # curves are recorded without graphs
    assert len(set(graphs)) == 1
    assert 0 < graphs[0] < 30
