"""Accelerators on whole pipelines of diffusers: evaluations told from timesteps, bits kept, the model restored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from tiny_pipelines import audioldm2, stable_audio, stable_audio_dit
from torch import Tensor, nn

from foley.accel.attention.litefocus import LiteFocus
from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.calibration import CalibrationRecorder, calibration_stem
from foley.accel.caching.fora import Fora
from foley.accel.caching.schedule import SignatureMismatchError
from foley.accel.caching.smoothcache import SmoothCache
from foley.accel.combined import NoAcceleration
from foley.accel.diffusers.pipelines import accelerated
from foley.diffusion.context import RunContext, StepContext

STEPS = 5


class Watcher(NoAcceleration):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.runs: list[RunContext] = []
        self.branches: list[str] = []

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        self.events.append("attach")
        yield
        self.events.append("detach")

    def on_run_start(self, run: RunContext) -> None:
        self.runs.append(run)
        self.events.append("start")

    def on_evaluation_start(self, context: StepContext) -> None:
        assert context.timestep == context.run.timesteps[context.evaluation]
        self.events.append(context.evaluation)
        self.branches.append(context.branch)

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self.events.append(tuple(prediction.shape))

    def on_run_end(self) -> None:
        self.events.append("end")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = stable_audio()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generate(pipeline: Any, accelerator: Any = None, items: int = 2, steps: int = STEPS, scale: float = 7.0) -> Tensor:
    """Latents of `items` clips of one prompt, with the seeds 0, 1, ..."""
    options = {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "num_waveforms_per_prompt": items,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(items)],
        "output_type": "latent",
    }
    if accelerator is None:
        latents: Tensor = pipeline("a dog barks", audio_end_in_s=0.1, **options).audios
        return latents
    with accelerated(pipeline.transformer, pipeline.scheduler, scale, accelerator):
        return _generate(pipeline, None, items, steps, scale)


@pytest.fixture(scope="module")
def calibration_dir(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recorder, directory = CalibrationRecorder(), tmp_path_factory.mktemp("calibration")
    plain = _generate(pipeline)
    assert torch.equal(_generate(pipeline, recorder), plain)
    calibration = recorder.calibration()
    assert calibration.num_prompts == 2
    assert calibration.signature.solver == "CosineDPMSolverMultistepScheduler"
    assert calibration.mean[:, 0, 1:].min() > 0
    calibration.save(calibration_stem(directory, calibration.signature.solver, STEPS))
    return directory


@pytest.mark.parametrize(("scale", "rows"), [(7.0, 4), (1.0, 2)])
def test_a_pipeline_tells_of_its_evaluations(pipeline: Any, scale: float, rows: int) -> None:
    watcher = Watcher()
    _generate(pipeline, watcher, scale=scale)
    evaluations = [event for index in range(STEPS) for event in (index, (rows, 4, 32))]
    assert watcher.events == ["attach", "start", *evaluations, "end", "detach"]
    run = watcher.runs[0]
    assert (run.batch_size, run.num_steps, run.guidance_scale, run.num_evaluations) == (2, STEPS, scale, STEPS)


def test_the_neutral_settings_keep_every_bit(pipeline: Any, calibration_dir: Path) -> None:
    plain = _generate(pipeline)
    for neutral in (AudioCache(calibration_dir, 0.0), SmoothCache(calibration_dir, 0.0), Fora(1)):
        assert torch.equal(_generate(pipeline, neutral), plain)


def test_two_generations_in_a_row_are_two_fresh_ones(pipeline: Any, calibration_dir: Path) -> None:
    def accelerators() -> list[Any]:
        return [Fora(2), Fora(2, "taylor"), AudioCache(calibration_dir, 1e9)]

    for first, again in zip(accelerators(), accelerators(), strict=True):
        with accelerated(pipeline.transformer, pipeline.scheduler, 7.0, first):
            in_a_row = [_generate(pipeline), _generate(pipeline)]
        fresh = _generate(pipeline, again)
        assert torch.equal(in_a_row[0], fresh)
        assert torch.equal(in_a_row[1], fresh)
        assert not torch.equal(fresh, _generate(pipeline))


def test_another_step_count_or_model_is_refused(pipeline: Any, calibration_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"calibrate\.py model=audioldm2 prompts=FILE steps=3 "):
        _generate(pipeline, AudioCache(calibration_dir, source={"model": "audioldm2"}), steps=3)
    other = stable_audio()
    other.set_progress_bar_config(disable=True)
    other.transformer = stable_audio_dit(num_layers=1)
    with pytest.raises(SignatureMismatchError, match="model_hash"):
        _generate(other, AudioCache(calibration_dir))
    assert not any("forward" in vars(module) for module in other.transformer.modules())


def test_an_error_inside_leaves_the_model_untouched(pipeline: Any) -> None:
    plain, watcher = _generate(pipeline), Watcher()
    for accelerator in (Fora(2), watcher):
        hook = pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _generate(pipeline, accelerator)
        hook.remove()
        assert not any("forward" in vars(module) for module in pipeline.transformer.modules())
    assert watcher.events == ["attach", "start", 0, "end"]
    assert torch.equal(_generate(pipeline), plain)


def test_a_forward_that_was_replaced_before_is_put_back(pipeline: Any) -> None:
    own = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    offloaded = pipeline.transformer.forward
    _generate(pipeline, Fora(2))
    assert pipeline.transformer.forward is offloaded
    del pipeline.transformer.forward


def _loop(scheduler: Any, accelerator: Any, calls: int = 1, sample: str | None = None) -> None:
    """What a pipeline does, with a denoiser that takes its inputs by name or by position."""

    class Denoiser(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (hidden_states * 0.1,)

    denoiser, latent = Denoiser(), torch.randn(1, 4, 8)
    scheduler.set_timesteps(3)
    with accelerated(denoiser, scheduler, 1.0, accelerator):
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latent, timestep)
            for _ in range(calls):
                output = denoiser(hidden_states=noisy, timestep=timestep) if sample else denoiser(noisy, timestep)
            latent = scheduler.step(output[0], timestep, latent).prev_sample


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_evaluations_of_any_scheduler_are_told_apart(scheduler: Any) -> None:
    """By its index, which a second-order solver needs, or by the timestep's value."""
    for sample in (None, "hidden_states"):
        watcher = Watcher()
        _loop(scheduler(), watcher, sample=sample)
        indices = [event for event in watcher.events if isinstance(event, int)]
        assert indices == list(range(5 if scheduler is HeunDiscreteScheduler else 3))


def test_calls_at_one_evaluation_are_branches_in_order() -> None:
    watcher = Watcher()
    _loop(DDIMScheduler(), watcher, calls=2)
    assert [event for event in watcher.events if isinstance(event, int)] == [0, 0, 1, 1, 2, 2]
    assert watcher.branches == ["joint", "joint 2"] * 3


def test_a_foreign_scheduler_is_refused(pipeline: Any) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    with (
        pytest.raises(ValueError, match="none of the 3 of the scheduler"),
        accelerated(pipeline.transformer, scheduler, 7.0, Watcher()),
    ):
        _generate(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", [Fora(2), LiteFocus(blocks=["down_blocks.1"]), CalibrationRecorder()])
def test_audioldm2_takes_them_too(accelerator: Any) -> None:
    """The U-Net alone: the whole pipeline is tested with its published index."""
    unet, scheduler = audioldm2().unet.eval(), DDIMScheduler()
    scheduler.set_timesteps(4)
    torch.manual_seed(0)
    language, text = torch.randn(2, 4, 8), torch.randn(2, 5, 16)
    noise = torch.randn(1, 4, 8, 4)

    @torch.no_grad()
    def loop() -> Tensor:
        latent = noise
        for timestep in scheduler.timesteps:
            noisy = torch.cat([latent] * 2)
            negative, positive = unet(noisy, timestep, language, encoder_hidden_states_1=text).sample.chunk(2)
            latent = scheduler.step(negative + 3.5 * (positive - negative), timestep, latent).prev_sample
        return latent

    plain = loop()
    with accelerated(unet, scheduler, 3.5, accelerator):
        changed = loop()
    assert torch.equal(plain, changed) == isinstance(accelerator, CalibrationRecorder)
    assert torch.equal(loop(), plain)
