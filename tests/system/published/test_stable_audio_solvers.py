"""Our solvers on Stable Audio's transformer: the library's own result, seeds, caches, impossible requests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CosineDPMSolverMultistepScheduler
from tiny_pipelines import stable_audio, stable_audio_dit

from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.calibration import Calibration
from foley.accel.caching.fora import Fora
from foley.accel.caching.smoothcache import SmoothCache
from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.pipeline_to_audio import PipelineToAudio
from foley.generation.prompts import as_clips
from foley.generation.settings import GenerationSettings
from foley.system.published.stable_audio import StableAudio

NOISE = "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep.BrownianTreeNoiseSampler"
SECONDS = 0.2
SCALE = ClassifierFreeGuidance(4.0)


class SolverNoise:
    """In the place of the library's Brownian tree: the noise that our stochastic solvers draw for these seeds."""

    def __init__(self, like: torch.Tensor, seed: list[int], **_: Any) -> None:
        self.shape, self.generators = like[0].shape, [torch_generator("solver noise", number) for number in seed]

    def __call__(self, *_: Any) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


@pytest.fixture(scope="module")
def generator() -> PipelineToAudio:
    pipeline = stable_audio()
    pipeline.set_progress_bar_config(disable=True)
    return PipelineToAudio(StableAudio(pipeline))


def latents(generator: PipelineToAudio, seeds: list[int], **options: Any) -> torch.Tensor:
    """Of one prompt a seed, by `_latents`, which both ways of sampling go through."""
    settings = GenerationSettings(**{"duration_seconds": SECONDS, "guidance": SCALE, "num_steps": 5, **options})
    clips = as_clips([f"rain falls {seed}" for seed in seeds], seeds)
    return generator._latents(clips, settings, generator._plan(settings), None)


@pytest.mark.parametrize(
    ("solver", "order", "num_steps", "negative"),
    [("ddpm", 1, 5, ""), ("dpmpp_2m_sde", 2, 5, "thunder"), ("dpmpp_2m_sde", 2, 18, "")],
)
def test_the_pipeline_makes_the_same_of_the_same_noise(
    generator: PipelineToAudio, monkeypatch: Any, solver: str, order: int, num_steps: int, negative: str
) -> None:
    pipeline = generator.audio.pipeline
    monkeypatch.setattr(NOISE, SolverNoise)
    monkeypatch.setattr(pipeline, "scheduler", CosineDPMSolverMultistepScheduler(solver_order=order))
    options = {"num_steps": num_steps, "negative_prompt": negative}
    expected = latents(generator, [3, 5], **options)
    actual = latents(generator, [3, 5], solver=solver, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["dpmpp_3m_sde", "heun", "ddim", "unipc"])
def test_an_item_ignores_its_batch_and_follows_its_seed(generator: PipelineToAudio, solver: str) -> None:
    options = {"solver": solver, "eta": 1.0 if solver == "ddim" else 0.0}
    both = latents(generator, [3, 5], **options)
    torch.testing.assert_close(latents(generator, [5], **options), both[1:], rtol=1e-3, atol=1e-4)
    assert both.isfinite().all()
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_a_clip_says_what_it_was_sampled_with(generator: PipelineToAudio) -> None:
    options = {"num_steps": 4, "guidance": ClassifierFreeGuidance(4.0, 0.5)}  # a rescale, which ours takes
    made = generator.generate(["rain"], SECONDS, [3], solver="ddim", eta=1.0, **options)
    assert made.audio.shape == (1, 2, round(SECONDS * generator.sample_rate_hz))
    facts = {name: made.settings[name] for name in ("solver", "eta", "num_steps", "guidance_rescale")}
    assert facts == {"solver": "ddim", "eta": 1.0, "num_steps": 4, "guidance_rescale": 0.5}
    plain = generator.generate(["rain"], SECONDS, [3], solver="ddim", eta=1.0, num_steps=4, guidance=SCALE)
    assert not torch.equal(made.audio, plain.audio)


CACHES = {
    "audiocache": lambda folder: AudioCache(folder, threshold=0.05, calibrate="auto"),
    "smoothcache": lambda folder: SmoothCache(folder, alpha=0.1, calibrate="auto"),
    "fora": lambda folder: Fora(2),
}


@pytest.mark.parametrize(
    ("name", "solver"), [("audiocache", "heun"), ("smoothcache", "dpmpp_3m_sde"), ("fora", "heun")]
)
def test_caches_calibrate_by_themselves_and_count_evaluations(
    generator: PipelineToAudio, tmp_path: Path, name: str, solver: str
) -> None:
    cache, request = CACHES[name](tmp_path), {"solver": solver, "num_steps": 4, "guidance": SCALE}
    cached = generator.generate(["rain"], SECONDS, [3], accelerator=cache, **request)
    evaluations = 7 if solver == "heun" else 4
    assert cache.schedule is not None
    assert cache.schedule.compute.shape[0] == evaluations
    share = cached.settings["macs"] / cached.settings["macs_uncached"]
    assert 0 < share < 1
    if name != "fora":
        calibration = Calibration.load(tmp_path / f"{solver}_4_w4")
        assert (calibration.signature.solver, calibration.mean.shape[2]) == (solver, evaluations)
        assert len(calibration.timesteps) == evaluations


def test_an_interval_of_one_keeps_every_bit(generator: PipelineToAudio) -> None:
    plain, neutral, cached = (
        generator.generate(["rain"], SECONDS, [3], accelerator=cache, solver="heun", num_steps=3, guidance=SCALE).audio
        for cache in (None, Fora(1), Fora(2))
    )
    assert torch.equal(plain, neutral)
    assert not torch.equal(plain, cached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun_flow"}, "cannot sample a model that predicts 'v'"),
        ({"solver": "consistency"}, "samples students only"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
        ({"solver": "heun", "eta": 0.5}, "eta=0.5 is an option of solver 'ddim' alone"),
        ({"eta": 0.5}, "give solver=ddim too"),
        ({"solver": "heun", "window_seconds": 0.1}, "generates a clip as a whole"),
        ({"guidance": ClassifierFreeGuidance(3.0, 0.5)}, "a solver of ours takes both, as solver=heun"),
    ],
)
def test_impossible_combinations_are_refused(generator: PipelineToAudio, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(["rain"], SECONDS, **options)


def test_a_model_of_another_schedule_is_refused() -> None:
    pipeline = stable_audio()
    pipeline.scheduler = CosineDPMSolverMultistepScheduler(sigma_data=0.5)
    with pytest.raises(ValueError, match=r"sigma_data=0.5 is not Stable Audio's schedule"):
        PipelineToAudio(StableAudio(pipeline)).generate(["rain"], SECONDS, solver="heun", num_steps=2)


def test_the_transformer_sees_the_time_of_each_evaluation() -> None:
    """In (0, 1), from the noisiest on; Heun sees each but the first twice, and bounds steps that are few."""
    pipeline = stable_audio()
    pipeline.transformer = stable_audio_dit()
    seen: list[float] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(args[1][0])), with_kwargs=True
    )
    latents(PipelineToAudio(StableAudio(pipeline)), [0], solver="heun", num_steps=3)
    expected = [
        sigma.atan() * 2 / torch.pi for sigma in torch.tensor([500.0, 500 / 4.5, 500 / 4.5, 500 / 4.5**2, 500 / 4.5**2])
    ]
    assert seen == pytest.approx([float(time) for time in expected], rel=1e-4)
