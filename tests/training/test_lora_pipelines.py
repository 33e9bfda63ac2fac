"""Adapters of the transformers of published pipelines: trained as ours are, taken by the pipelines themselves."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_families
import tiny_pipelines
import torch

from foley.core.components import CheckpointError
from foley.data.dataset import AudioBatch
from foley.generation.pipeline_to_audio import PipelineToAudio
from foley.models.lora import AdaptedDenoiser
from foley.system.published.ace_step import AceStep
from foley.system.published.audioldm import AudioLDM
from foley.system.published.longcat import LongCat
from foley.system.published.stable_audio import StableAudio
from foley.system.published.stable_audio_3 import StableAudio3
from foley.system.published.tangoflux import TangoFlux
from foley.system.published.training import pipeline_system
from foley.training.distillation import Teacher
from foley.training.lora import AdapterWriter, LoraTraining, load_base

FAMILIES = {
    "stable_audio": lambda: StableAudio(tiny_pipelines.stable_audio()),
    "tangoflux": lambda: TangoFlux(tiny_families.tangoflux()),
    "stable_audio_3": lambda: StableAudio3(tiny_families.stable_audio_3(stochastic=False)),
    "ace_step": lambda: AceStep(tiny_families.ace_step()),
    "longcat": lambda: LongCat(tiny_families.longcat()),
}
SECONDS = 0.1


def lora_training(audio) -> LoraTraining:
    base = Teacher(pipeline_system(audio, "a pipeline"), set())
    lora = partial(AdaptedDenoiser, rank=2)
    module = LoraTraining(base, lora, partial(torch.optim.AdamW, lr=1e-2), caption="a zorble")
    module.log = lambda *args, **options: None
    module._trainer = SimpleNamespace(global_step=0)
    return module


def audio_batch(rate_hz: int) -> AudioBatch:
    samples = round(SECONDS * rate_hz)
    audio = 0.1 * torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(1))
    about = {"caption": ["", "rain"], "label": ["", ""], "id": ["a", "b"]}
    return AudioBatch(audio=audio, length_samples=torch.tensor([samples, samples]), **about)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_reaches_the_adapters_and_the_pipeline_takes_what_they_have_learnt(name: str, tmp_path: Path) -> None:
    audio = FAMILIES[name]()
    plain = PipelineToAudio(FAMILIES[name]()).generate(["a zorble"], SECONDS, [3], num_steps=2).audio
    module = lora_training(audio)
    generator = torch.Generator().manual_seed(0)
    own = module.latents(audio_batch(module.codec.sample_rate_hz), generator)
    assert own["latent"].shape[:2] == (2, module.denoiser.latent_channels)
    clean, noise = own["latent"], torch.randn(own["latent"].shape, generator=generator)
    timestep = module.process.sample_timesteps(2, generator)
    loss = module._errors(clean, noise, timestep, module.condition(own), None, None).mean()
    loss.backward()
    trained = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in key for key in trained)
    assert all(parameter.grad is not None for parameter in trained.values())
    torch.optim.SGD(trained.values(), lr=100.0).step()

    module.captions = {"a zorble"}
    trainer = SimpleNamespace(global_step=1, datamodule=None)
    AdapterWriter(str(tmp_path), "a pipeline").on_save_checkpoint(trainer, module, {"state_dict": module.state_dict()})
    generator = PipelineToAudio(FAMILIES[name]())
    generator.use_adapters([tmp_path / "adapter"])  # of the same weights: nothing has to be insisted on
    assert not torch.equal(generator.generate(["a zorble"], SECONDS, [3], num_steps=2).audio, plain)


def test_tangoflux_is_called_as_its_pipeline_calls_it() -> None:
    audio = FAMILIES["tangoflux"]()
    system, pipeline = pipeline_system(audio, "tangoflux"), audio.pipeline
    denoiser, text = system.modules["denoiser"], system.modules["text"]
    denoiser.duration_seconds = text.duration_seconds = SECONDS
    noisy = torch.randn(1, 4, pipeline.conditioner.config.num_frames)
    embedded = text(["rain"])
    ours = denoiser(noisy, torch.tensor([700.0]), embedded.embeddings, embedded.mask)
    condition = pipeline._condition(["rain"], None, SECONDS)
    theirs = pipeline.transformer(noisy.mT, timestep=torch.tensor([0.7]), return_dict=False, **condition)[0].mT
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def first_call(audio, prompt: str, seconds: float) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Noisy latent, time and prediction of the transformer in a run of the pipeline's own, as it counts them."""
    calls = []
    hook = audio.denoiser.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    generator = [torch.Generator().manual_seed(3)]
    audio.latents([prompt], None, seconds, num_inference_steps=2, guidance_scale=1.0, generator=generator)
    hook.remove()
    args, kwargs, found = calls[-1]
    noisy = kwargs.get("hidden_states", args[0] if args else None)
    timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    return noisy, float(timestep[0]), found[0] if isinstance(found, tuple) else found.sample


@pytest.mark.parametrize("name", ["stable_audio_3", "ace_step", "longcat"])
@torch.no_grad()
def test_a_family_is_called_as_its_pipeline_calls_it(name: str) -> None:
    audio = FAMILIES[name]()
    denoiser, text = (pipeline_system(audio, name).modules[part] for part in ("denoiser", "text"))
    denoiser.duration_seconds = text.duration_seconds = SECONDS
    embedded = text(["rain", "a long prompt of wind"])  # padding is not heard
    noisy, time, expected = first_call(audio, "rain", SECONDS)
    if name != "stable_audio_3":  # which alone has channels first
        noisy, expected = noisy.mT, expected.mT
    if name == "longcat":  # whose time leads from noise to data
        time, expected = 1 - time, -expected
    ours = denoiser(noisy.expand(2, -1, -1), torch.full((2,), 1000 * time), embedded.embeddings, embedded.mask)
    torch.testing.assert_close(ours[:1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours[1:], expected, atol=1e-3)
    noise, clean = torch.randn(2, *expected.shape)
    process = pipeline_system(audio, name).process
    torch.testing.assert_close(process.target(clean, noise, torch.tensor([500.0])), noise - clean)


def test_the_empty_prompt_is_what_guidance_leads_away_from() -> None:
    longcat, ace_step = FAMILIES["longcat"](), FAMILIES["ace_step"]()
    assert not longcat.tokens([""], SECONDS)[0].any()
    tokens, valid = ace_step.tokens(["rain", ""], SECONDS)
    learned = ace_step.pipeline.condition_encoder.null_condition_emb[0, 0]
    torch.testing.assert_close(tokens[1, valid[1]], learned.expand(int(valid[1].sum()), -1))
    assert not torch.allclose(tokens[0, 0], learned)


def test_a_distilled_model_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    pipeline_system(AceStep(tiny_families.ace_step(turbo=True)), "turbo")
    assert "turbo is distilled to few steps" in caplog.text
    assert FAMILIES["stable_audio_3"]().is_distilled is False
    assert StableAudio3(tiny_families.stable_audio_3()).is_distilled


def test_stable_audio_hears_nothing_of_the_empty_prompt() -> None:
    audio = FAMILIES["stable_audio"]()
    tokens, _ = audio.tokens(["rain", ""], SECONDS)
    text, silence, _ = audio._conditions(["rain"], None, SECONDS)
    torch.testing.assert_close(tokens[:1], text.context)
    assert torch.equal(tokens[1:], silence.context)


def test_a_family_that_does_not_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="adapters of AudioLDM, a U-Net, are used here, but not trained"):
        pipeline_system(AudioLDM(tiny_families.audioldm()), "audioldm")
    tiny_pipelines.stable_audio().save_pretrained(tmp_path / "pipeline")
    assert load_base(str(tmp_path / "pipeline")).system.modules["codec"].sample_rate_hz == 441
