"""Each family of pipelines from a folder: its clips, seeds, edits and accelerators, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import run_command
from diffusers import MusicLDMPipeline
from safetensors.torch import save_file
from tiny_families import ACE_STEP_RATE_HZ, FAMILIES, OOBLECK, RATE_HZ, TANGOFLUX_TRANSFORMER, tangoflux
from tiny_pipelines import AUDIOLDM2_RATE_HZ

from foley.accel.attention.litefocus import LiteFocus
from foley.accel.caching.audiocache import AudioCache
from foley.accel.caching.fora import Fora
from foley.accel.caching.prediction import PredictionReuse
from foley.accel.layers import find_cacheable_layers
from foley.core.components import CheckpointError
from foley.core.config import hub_name, published_config
from foley.core.hub import Hub
from foley.core.pipelines import known_config, system_config
from foley.data.audio import write_wav
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.editing import Edit, EditMask, Variation
from foley.generation.pipeline_to_audio import PipelineToAudio, open_generator
from foley.system.convert.tangoflux import to_ours, to_published
from foley.system.published.audio_pipelines import _FAMILIES
from foley.system.published.tangoflux import PublishedTangoFlux

RATES_HZ = dict.fromkeys(FAMILIES, RATE_HZ) | {"ace_step": ACE_STEP_RATE_HZ}
RATES_HZ |= dict.fromkeys(("audioldm", "musicldm"), AUDIOLDM2_RATE_HZ)
CHANNELS = dict.fromkeys(FAMILIES, 2) | dict.fromkeys(("longcat", "audioldm", "musicldm"), 1)
LAYERS = {"stable_audio_3": 6, "ace_step": 6, "longcat": 6, "audioldm": 12}
QUICK_ONES = ["stable_audio_3", "longcat"]  # prompts as one batch, and each apart; the others do as one of them
SLOW_ONES = [name for name in FAMILIES if name not in QUICK_ONES]
SECONDS = 0.051
QUICK: dict[str, Any] = {"num_steps": 2, "guidance": ClassifierFreeGuidance(4.0)}
UNGUIDED: dict[str, Any] = {"num_steps": 2, "guidance": ClassifierFreeGuidance(1.0)}

Open = Callable[[str], PipelineToAudio]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Each pipeline saved to a folder, and opened by the folder alone, the first time that it is asked for."""
    folder, generators = tmp_path_factory.mktemp("families"), {}

    def open_family(name: str) -> PipelineToAudio:
        if name not in generators:
            FAMILIES[name]().save_pretrained(folder / name)
            generators[name] = open_generator(folder / name, max_duration_seconds=0.6)
        made = generators[name]
        assert isinstance(made, PipelineToAudio)
        return made

    return open_family


@pytest.fixture(params=[*QUICK_ONES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_ONES)])
def family(request: Any) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", ["stable_audio_3", pytest.param("tangoflux", marks=pytest.mark.slow)])
def test_steps_are_followed_and_may_be_stopped_between_two(name: str, opened: Open) -> None:
    generator, seen = opened(name), []

    def watch(steps: Any) -> Any:
        for step in steps:
            seen.append(step)
            if len(seen) > 3:
                raise InterruptedError
            yield step

    generator.generate(["rain"], SECONDS, [7], progress=watch, **QUICK)
    assert seen == [0, 1]
    with pytest.raises(InterruptedError):
        generator.generate(["rain"], SECONDS, [7], progress=watch, **QUICK)
    assert seen == [0, 1, 0, 1]
    assert "progress_bar" not in vars(generator.audio.pipeline)


def test_a_clip_has_length_channels_and_rate_and_ignores_its_batch(family: str, opened: Open) -> None:
    generator, prompts = opened(family), ["rain", "a dog barks"]
    both = generator.generate(prompts, SECONDS, [3, 5], batch_size=2, **QUICK)
    assert both.audio.shape == (2, CHANNELS[family], round(SECONDS * RATES_HZ[family]))
    assert both.sample_rate_hz == RATES_HZ[family]
    alone = generator.generate(["a dog barks"], SECONDS, [5], **QUICK).audio[0]
    torch.testing.assert_close(alone, both.audio[1], rtol=1e-3, atol=1e-4)
    other = generator.generate(["a dog barks"], SECONDS, [4], **QUICK).audio[0]
    assert not torch.allclose(alone, other, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_audio_3", "longcat", "audioldm", "musicldm", "tangoflux"])
def test_a_negative_prompt_leads_away(name: str, opened: Open) -> None:
    plain, away = (
        opened(name).generate(["rain"], SECONDS, [3], negative_prompt=negative, **QUICK).audio
        for negative in ("", "thunder")
    )
    assert not torch.equal(plain, away)


def _call(name: str, **arguments: Any) -> Any:
    """What the pipeline's own call makes of "rain" with seed 7."""
    return lambda pipeline: (
        pipeline(
            "rain", num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator().manual_seed(7), **arguments
        ).audios
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("stable_audio_3", _call("stable_audio_3", duration=SECONDS)),
        pytest.param("ace_step", _call("ace_step", audio_duration=SECONDS), marks=pytest.mark.slow),
        ("longcat", _call("longcat", audio_duration_s=5.5 * 8 / RATE_HZ)),
    ],
)
def test_a_clip_is_what_diffusers_makes_with_the_same_seed(name: str, call: Any, opened: Open) -> None:
    seconds = 5 * 8 / RATE_HZ if name == "longcat" else SECONDS
    ours = opened(name).generate(["rain"], seconds, [7], **QUICK).audio
    theirs = torch.as_tensor(np.asarray(call(opened(name).audio.pipeline)))
    length = min(ours.shape[-1], theirs.shape[-1])  # theirs are rounded down
    torch.testing.assert_close(ours[..., :length], theirs[..., :length], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_audioldm_is_what_its_own_call_makes_with_the_same_seed(opened: Open) -> None:
    pipeline = FAMILIES["audioldm"]()
    pipeline.set_progress_bar_config(disable=True)
    theirs = _call("audioldm", audio_length_in_s=SECONDS)(pipeline)
    ours = opened("audioldm").generate(["rain"], SECONDS, [7], **QUICK).audio[0]
    np.testing.assert_allclose(ours.numpy()[:, : theirs.shape[1]], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_found_and_reused(name: str, opened: Open, tmp_path: Path) -> None:
    generator = opened(name)
    assert len(find_cacheable_layers(generator.audio.denoiser)) == LAYERS[name]
    cache = AudioCache(tmp_path, threshold=10.0, calibrate="auto")
    plain, neutral, cached, calibrated = (
        generator.generate(["rain"], SECONDS, [3], accelerator=accelerator, **QUICK)
        for accelerator in (None, Fora(1), Fora(2), cache)
    )
    assert torch.equal(plain.audio, neutral.audio)
    assert not torch.equal(plain.audio, cached.audio)
    for made in (cached, calibrated):
        assert made.settings["macs"] < made.settings["macs_uncached"] == neutral.settings["macs"]
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.slow
def test_tangoflux_reuses_what_is_found_of_its_blocks(opened: Open) -> None:
    generator = opened("tangoflux")
    plain, cached = (
        generator.generate(["rain"], SECONDS, [3], accelerator=accelerator, **QUICK) for accelerator in (None, Fora(2))
    )
    assert not torch.equal(plain.audio, cached.audio)
    assert cached.settings["macs"] < cached.settings["macs_uncached"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audioldm", "musicldm"])
def test_litefocus_on_the_u_nets_of_mel_spectrograms(name: str, opened: Open) -> None:
    blocks = {"blocks": ["down_blocks.1", "up_blocks.0"]}
    plain, sparse = (
        opened(name).generate(["rain"], SECONDS, [3], accelerator=accelerator, **QUICK)
        for accelerator in (None, LiteFocus(**blocks))
    )
    assert plain.audio.shape == sparse.audio.shape
    assert not torch.equal(plain.audio, sparse.audio)


def test_litefocus_refuses_a_transformer_by_name(opened: Open) -> None:
    with pytest.raises(ValueError, match=r"StableAudio3DiTModel holds 0 .*accel=local_global"):
        opened("stable_audio_3").generate(["rain"], SECONDS, accelerator=LiteFocus(), **QUICK)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A tenth of a second of stereo noise at a rate, the second channel quieter."""
    folder = tmp_path_factory.mktemp("recordings")

    def at_rate(rate_hz: int) -> Path:
        noise = torch.randn(2, round(0.25 * rate_hz), generator=torch.Generator().manual_seed(1)).clamp(-3, 3) / 8
        path = folder / f"{rate_hz}.wav"
        write_wav(path, noise * torch.tensor([[1.0], [0.5]]), rate_hz)
        return path

    return at_rate


@pytest.mark.parametrize("name", ["stable_audio_3", pytest.param("ace_step", marks=pytest.mark.slow)])
def test_an_edit_keeps_both_channels_outside_of_the_mask(
    name: str, opened: Open, recordings: Callable[[int], Path]
) -> None:
    rate, generator = RATES_HZ[name], opened(name)
    edit = Edit(recordings(rate), EditMask(0.1, 0.05, boundary_seconds=0.08))
    options = UNGUIDED if name == "stable_audio_3" else QUICK
    made = generator.generate(["rain", "a dog"], seeds=[3, 5], source=edit, **options)
    kept = generator._read(edit.file, "edit", "mean").samples
    first, last = round(0.1 * rate), round(0.15 * rate)
    assert made.audio.shape == (2, *kept.shape)
    for part in (slice(0, first), slice(last, None)):
        assert torch.equal(made.audio[..., part], kept[..., part].expand(2, -1, -1))
    assert not torch.allclose(made.audio[0, :, first:last], made.audio[1, :, first:last], atol=1e-3)
    alone = generator.generate(["a dog"], seeds=[5], source=edit, accelerator=Fora(1), **options).audio
    torch.testing.assert_close(alone[0], made.audio[1], rtol=1e-3, atol=1e-4)
    assert made.settings["edit"]["mask_start_seconds"] == 0.1
    assert "downmix" not in made.settings["edit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_audio_3", "ace_step"])
def test_a_variation_has_the_length_of_its_recording_and_follows_its_strength(
    name: str, opened: Open, recordings: Callable[[int], Path]
) -> None:
    near, far = (
        opened(name).generate(["rain"], seeds=[3], source=Variation(recordings(RATES_HZ[name]), strength), **UNGUIDED)
        for strength in (0.1, 0.9)
    )
    assert near.audio.shape == far.audio.shape == (1, 2, round(0.25 * RATES_HZ[name]))
    assert not torch.allclose(near.audio, far.audio, atol=1e-3)
    assert near.settings["init"]["strength"] == 0.1


def test_stable_audio_3_varied_in_full_is_plain_generation(opened: Open, recordings: Callable[[int], Path]) -> None:
    generator, options = opened("stable_audio_3"), {**UNGUIDED, "seeds": [3]}
    whole = generator.generate(["rain"], source=Variation(recordings(RATE_HZ), 1.0), **options).audio
    # The pipelines embed half a sample less of the duration.
    plain = generator.generate(["rain"], (round(0.25 * RATE_HZ) - 0.5) / RATE_HZ, **options).audio
    torch.testing.assert_close(whole[..., : plain.shape[-1]], plain, rtol=1e-4, atol=1e-5)


def test_lyrics_are_sung_by_those_who_take_them(opened: Open) -> None:
    silent, sung = (
        opened("ace_step").generate(["a ballad"], SECONDS, [3], lyrics=lyrics, **QUICK) for lyrics in ("", "snow falls")
    )
    assert not torch.equal(silent.audio, sung.audio)
    assert sung.settings["lyrics"] == "snow falls"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("longcat", {"lyrics": "snow"}, "lyrics='snow': this system takes captions alone"),
        ("longcat", {"source": Variation("dog.wav")}, "edit, init and control need a system of ours"),
        ("ace_step", {"negative_prompt": "noise"}, "AceStep guides away from an embedding that it has learned"),
        ("stable_audio_3", {"source": Variation("dog.wav", 0.0)}, "strength=0: a pipeline varies"),
        ("stable_audio_3", {"source": Variation("dog.wav"), **QUICK}, "guidance_scale=4: Stable Audio 3 edits"),
        ("stable_audio_3", {"duration_seconds": 0.7}, r"duration_seconds must be at most 0\.6, got 0\.7"),
        ("tangoflux", {"duration_seconds": 0.5}, r"duration_seconds must be at most 0\.4"),
        ("stable_audio_3", {"solver": "heun"}, "solver=heun: a published pipeline keeps its own"),
    ],
)
def test_what_a_family_cannot_do_is_refused(name: str, options: Any, message: str, opened: Open) -> None:
    with pytest.raises(ValueError, match=message):
        opened(name).generate(["rain"], **options)


@pytest.mark.slow
def test_a_cover_calls_the_transformer_twice_a_step_and_reuses_both(
    opened: Open, recordings: Callable[[int], Path]
) -> None:
    options: Any = {"seeds": [3], "source": Variation(recordings(ACE_STEP_RATE_HZ), 0.5), "num_steps": 6}
    options["guidance"] = ClassifierFreeGuidance(4.0)
    neutral, reused, cached = (
        opened("ace_step").generate(["rain"], accelerator=accelerator, **options)
        for accelerator in (Fora(1), PredictionReuse(interval=3), Fora(2))
    )
    generation = {**options, "source": None, "duration_seconds": 0.25, "accelerator": Fora(1)}
    plain = opened("ace_step").generate(["rain"], **generation).settings["macs"]
    assert 1.4 < neutral.settings["macs"] / plain < 1.6  # a joint batch of two, and the caption's alone
    for made in (reused, cached):
        assert made.settings["macs"] < made.settings["macs_uncached"] == neutral.settings["macs"]
        assert made.audio.isfinite().all()
    assert reused.settings["computed_evaluations"][0] == 0


@pytest.mark.slow
def test_a_turbo_model_takes_no_guidance() -> None:
    from tiny_families import ace_step

    from foley.system.published.ace_step import AceStep

    generator = PipelineToAudio(AceStep(ace_step(turbo=True)))
    with pytest.raises(ValueError, match="guidance_scale=4: this ACE-Step is a turbo model"):
        generator.generate(["rain"], SECONDS, **QUICK)
    assert generator.generate(["rain"], SECONDS, **UNGUIDED).audio.isfinite().all()


def _published_tangoflux(directory: Path) -> Path:
    """The small pipeline in the layout of the hub: the authors' files, and the text encoder's own repository."""
    pipeline, folder = tangoflux(), directory / "declare-lab" / "TangoFlux"
    folder.mkdir(parents=True)
    parts = {"transformer": pipeline.transformer, "conditioner": pipeline.conditioner}
    ours = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    frozen = {f"text_encoder.{key}": value.clone() for key, value in pipeline.text_encoder.state_dict().items()}
    save_file({**to_published(ours), **frozen}, folder / "tangoflux.safetensors")
    save_file(pipeline.vae.state_dict(), folder / "vae.safetensors")
    sizes = {key: TANGOFLUX_TRANSFORMER[key] for key in TANGOFLUX_TRANSFORMER if key != "guidance_embeds"}
    (folder / "config.json").write_text(json.dumps({**sizes, "audio_seq_len": 40, "max_duration": 30}))
    for part in (pipeline.text_encoder, pipeline.tokenizer):
        part.save_pretrained(directory / "google" / "flan-t5-large")
    return directory


def test_tangoflux_from_its_authors_files_is_the_pipeline(tmp_path: Path, opened: Open) -> None:
    hub = _published_tangoflux(tmp_path)
    loader = PublishedTangoFlux("declare-lab/TangoFlux", vae=OOBLECK)
    published = PipelineToAudio(loader.load(Hub(hub), tmp_path))
    request: Any = (["rain"], SECONDS, [3])
    made, expected = (each.generate(*request, **QUICK).audio for each in (published, opened("tangoflux")))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    (hub / "declare-lab/TangoFlux/vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae\.safetensors does not exist"):
        loader.load(Hub(hub), tmp_path)


def test_the_map_of_tangofluxs_keys_is_whole_in_both_directions() -> None:
    keys = ["transformer.x_embedder.weight", "fc.0.bias", "duration_emebdder.time_positional_embedding.0.weights"]
    published = {key: torch.zeros(1) for key in keys}
    ours = to_ours(published)
    assert list(ours) == [
        "transformer.x_embedder.weight",
        "conditioner.pooled.0.bias",
        "conditioner.duration.time_positional_embedding.0.weights",
    ]
    assert list(to_published(ours)) == keys
    with pytest.raises(CheckpointError, match=r"head\.weight are in none of transformer"):
        to_ours({"head.weight": torch.zeros(1)})


def test_tangofluxs_time_is_what_the_authors_give_the_transformer(opened: Open) -> None:
    """Of 1000 training steps they give t / 1000, which runs from 1 by 1 / n."""
    generator, seen = opened("tangoflux"), []
    hook = generator.audio.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    generator.generate(["rain"], SECONDS, num_steps=4)
    hook.remove()
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_a_pipeline_is_known_by_its_class(tmp_path: Path) -> None:
    def config(name: str, kind: str) -> Any:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        return system_config(tmp_path / name, {"published": {"dtype": "float16"}})

    found = config("mine", "AceStepPipeline")
    assert (found.published.repository, found.published.dtype) == (str(tmp_path / "mine"), "float16")
    assert found.sampling == published_config("ace_step").sampling
    for kind in _FAMILIES:
        assert config(kind, kind).published.pipeline == kind
    with pytest.raises(CheckpointError, match="is a FluxPipeline, which is none of the pipelines that are sampled"):
        config("image", "FluxPipeline")
    config("owner/name", "MusicLDMPipeline")
    on_hub = system_config("owner/name", hub_dir=tmp_path)
    assert on_hub is not None
    assert on_hub.published.repository == "owner/name"
    with pytest.raises(
        CheckpointError, match="system=owner/other names no file or folder that exists, and neither a pipeline"
    ):
        system_config("owner/other", hub_dir=tmp_path)
    assert known_config("owner/other", hub_dir=tmp_path) is None
    assert system_config(tmp_path) is None
    assert hub_name(str(tmp_path)) is None


@pytest.mark.slow
def test_musicldm_still_needs_its_text_read_for_it() -> None:
    """Should this fail, the pipeline reads the new form itself, and `MusicLDM` may leave the embedding to it."""
    pipeline: MusicLDMPipeline = FAMILIES["musicldm"]()
    with pytest.raises(AttributeError, match="to"):
        pipeline("rain", audio_length_in_s=SECONDS, num_inference_steps=1)


def test_the_longest_clips_are_those_of_the_models(opened: Open) -> None:
    longest = {"stable_audio_3": 4.0, "ace_step": 15_000 * 8 / ACE_STEP_RATE_HZ, "longcat": 30.0, "tangoflux": 0.4}
    assert {name: opened(name).audio.max_duration_seconds for name in longest} == longest


@pytest.mark.slow
def test_calibrate_and_sample_a_folder_from_the_command_line(tmp_path: Path, recordings: Callable[[int], Path]) -> None:
    """The pipeline is known by its index alone, its steps and scale are those of its class, and an edit is stereo."""
    folder, prompts = tmp_path / "mine", tmp_path / "prompts.txt"
    FAMILIES["stable_audio_3"]().save_pretrained(folder)
    prompts.write_text("rain\na dog barks\n")
    run_command("script/calibrate", f"system={folder}", f"prompts={prompts}", "duration_seconds=0.2")
    assert (folder / "calibration/FlowMatchEulerDiscreteScheduler_8.json").is_file()
    request = [f"edit={recordings(RATE_HZ)}", "mask_start_seconds=0.1", "mask_length_seconds=0.05", "prompt=rain"]
    request += ["accel=audiocache", "accel.calibrate=never", "accel.threshold=9", f"output_dir={tmp_path / 'out'}"]
    run_command("sample", f"system={folder}", *request)
    (wave,) = (tmp_path / "out").glob("*.wav")
    info = soundfile.info(wave)
    assert (info.channels, info.samplerate, info.frames) == (2, RATE_HZ, round(0.25 * RATE_HZ))
    settings = json.loads(wave.with_suffix(".json").read_text())["settings"]
    assert (settings["num_steps"], settings["guidance_scale"]) == (8, 1.0)
    assert settings["macs"] < settings["macs_uncached"]
