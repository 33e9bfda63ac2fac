"""system=stable_audio_open and system=audioldm2: from a small folder in the hub's layout to what diffusers makes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from diffusers import StableAudioPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tiny_pipelines import AUDIOLDM2_RATE_HZ, STABLE_AUDIO_RATE_HZ, save_hub

from foley.accel.caching.fora import Fora
from foley.accel.layers import find_cacheable_layers
from foley.cli.sampling import describe_source
from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT
from foley.core.hub import Hub
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.pipeline_to_audio import PipelineToAudio, open_generator
from foley.generation.prompts import as_clips
from foley.generation.settings import GenerationSettings
from foley.system.checkpoint import published_loader
from foley.system.published import PublishedPipeline
from foley.system.published.audio_pipelines import pipeline_folder

RATES_HZ = {"stable_audio_open": STABLE_AUDIO_RATE_HZ, "audioldm2": AUDIOLDM2_RATE_HZ}
CHANNELS = {"stable_audio_open": 2, "audioldm2": 1}
QUICK: dict[str, Any] = {"num_steps": 3, "guidance": ClassifierFreeGuidance(4.0)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hub(tmp_path_factory.mktemp("hub"))


def _config(model: str, *overrides: str, name: str = "sample") -> Any:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose(name, overrides=[f"system={model}", *overrides])


def _open(model: str, hub: Path, overrides: dict[str, Any] | None = None) -> PipelineToAudio:
    generator = open_generator(model, hub_dir=hub, cache_dir=hub, overrides=overrides)
    assert isinstance(generator, PipelineToAudio)
    return generator


@pytest.fixture(scope="module", params=["stable_audio_open", "audioldm2"])
def model(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def generator(model: str, hub: Path) -> PipelineToAudio:
    return _open(model, hub)


def test_a_clip_has_the_length_asked_for_and_ignores_its_batch(model: str, generator: PipelineToAudio) -> None:
    prompts, seconds = ["rain", "a dog barks at the door"], 0.1007
    both = generator.generate(prompts, seconds, [3, 5], batch_size=2, **QUICK).audio
    assert both.shape == (2, CHANNELS[model], round(seconds * RATES_HZ[model]))
    for index, seed in enumerate((3, 5)):
        alone = generator.generate([prompts[index]], seconds, [seed], **QUICK).audio[0]
        assert torch.allclose(alone, both[index], atol=1e-5)
    assert not torch.allclose(both[0], generator.generate(["rain"], seconds, [4], **QUICK).audio[0], atol=1e-3)


def test_half_precision_is_close_and_recorded(generator: PipelineToAudio) -> None:
    exact = generator.generate(["rain"], 0.1, [3], **QUICK)
    assert exact.settings["precision"] == "float32"  # what `auto` is on a CPU
    generator.optimise("bf16")
    rounded = generator.generate(["rain"], 0.1, [3], **QUICK)
    generator.optimise()
    assert rounded.settings["precision"] == "bf16"
    assert rounded.audio.dtype == torch.float32
    assert 0 < (rounded.audio - exact.audio).norm() < 0.2 * exact.audio.norm()


def test_clips_for_a_calibration_are_denoised_in_the_precision_of_others(generator: PipelineToAudio) -> None:
    seen = []
    hook = generator.audio.denoiser.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    generator.optimise("bf16")
    try:
        generator.denoise_clips(as_clips(["rain"], [3]), GenerationSettings(duration_seconds=0.1, **QUICK))
    finally:
        generator.optimise()
        hook.remove()
    assert set(seen) == {True}


@pytest.mark.parametrize("negative", ["", "thunder"])
def test_stable_audio_is_what_diffusers_makes_with_the_same_seed(hub: Path, negative: str) -> None:
    pipeline = StableAudioPipeline.from_pretrained(hub / "stabilityai" / "stable-audio-open-1.0")
    options = {"negative_prompt": [negative]} if negative else {}
    expected = pipeline(
        ["rain"], 0.2, num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(7), **options
    ).audios
    actual = _open("stable_audio_open", hub).generate(["rain"], 0.2, [7], negative_prompt=negative, **QUICK)
    assert torch.equal(actual.audio, expected)


def test_audioldm2_is_what_diffusers_makes_with_the_same_seed(hub: Path) -> None:
    generator = _open("audioldm2", hub)
    for negative in ("", "thunder"):
        expected = generator.audio.pipeline(
            "rain",
            audio_length_in_s=0.1,
            num_inference_steps=3,
            guidance_scale=4.0,
            negative_prompt=negative,
            generator=torch.Generator().manual_seed(7),
        ).audios
        actual = generator.generate(["rain"], 0.1, [7], negative_prompt=negative, **QUICK).audio[0]
        assert np.array_equal(actual.numpy(), expected)


def test_an_interval_of_one_keeps_every_bit_and_costs_the_same(generator: PipelineToAudio) -> None:
    plain, neutral, cached = (
        generator.generate(["rain"], 0.1, accelerator=accelerator, **QUICK) for accelerator in (None, Fora(1), Fora(2))
    )
    assert torch.equal(plain.audio, neutral.audio)
    assert not torch.equal(plain.audio, cached.audio)
    assert "macs" not in plain.settings
    assert neutral.settings["macs"] == neutral.settings["macs_uncached"] == cached.settings["macs_uncached"]
    assert cached.settings["macs"] < cached.settings["macs_uncached"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 1.0}, "eta=1: the published solver of a pipeline has none"),
        ({"solver": "consistency"}, "solver=consistency: a published pipeline keeps|samples students only"),
        ({"num_steps": 0}, "num_steps=0: give a whole number >= 1"),
        ({"guidance": ClassifierFreeGuidance(3.0, 0.5)}, r"no rescale, got 3\.0 and 0\.5"),
        ({"duration_seconds": 99.0}, "duration_seconds must be at most"),
        ({"prompts": []}, "no prompts given"),
    ],
)
def test_impossible_requests_are_refused(generator: PipelineToAudio, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(**{"prompts": ["rain"], "duration_seconds": 0.1, **changes})


def test_a_pipeline_without_our_solvers_refuses_them_and_names_its_own(hub: Path) -> None:
    with pytest.raises(ValueError, match="solver=heun: a published pipeline keeps its own, but for Stable Audio's"):
        _open("audioldm2", hub).generate(["rain"], 0.1, solver="heun")


def test_the_published_settings_and_layers(hub: Path) -> None:
    expected = {"stable_audio_open": (100, 7.0), "audioldm2": (200, 3.5)}
    for model, settings in expected.items():
        cfg = _config(model, "cache_dir=/cache", "accel=smoothcache")
        assert (cfg.steps, cfg.guidance_scale) == settings
        assert (cfg.solver.name, cfg.guidance_rescale, describe_source(cfg)["ckpt"]) == ("published", 0.0, None)
        assert instantiate(cfg.accel.calibration_dir) == Path(f"/cache/{model}/calibration")
    named = _open("stable_audio_open", hub, {"published": {"cacheable_layers": {"transformer_blocks.*.ff": "norm3"}}})
    layers = find_cacheable_layers(named.audio.denoiser)
    assert [layer.name for layer in layers] == ["transformer_blocks.0.ff", "transformer_blocks.1.ff"]
    assert all(layer.norm is not None for layer in layers)


@pytest.mark.parametrize("missing", ["model_index.json", "transformer/config.json", "vae/*.safetensors"])
def test_a_folder_without_a_file_says_where_it_belongs(tmp_path: Path, missing: str) -> None:
    folder = save_hub(tmp_path) / "stabilityai" / "stable-audio-open-1.0"
    for file in folder.glob(missing):
        file.unlink()
    message = rf"{folder}/{missing} does not exist".replace("*", r"\*")
    with pytest.raises(CheckpointError, match=message) as error:
        _open("stable_audio_open", tmp_path)
    assert "https://huggingface.co/stabilityai/stable-audio-open-1.0" in str(error.value)


def test_a_download_that_finds_a_new_version_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the index is cached, of a version that the hub no longer has."""
    new, old = save_hub(tmp_path / "new") / "cvssp" / "audioldm2", tmp_path / "old"
    old.mkdir()
    shutil.copy(new / "model_index.json", old)
    monkeypatch.setattr(Hub, "file", lambda *names: old / "model_index.json")
    monkeypatch.setattr(Hub, "require_network", lambda *names: None)
    monkeypatch.setattr("foley.system.published.audio_pipelines.snapshot_download", lambda *_, **options: str(new))
    assert pipeline_folder(Hub(), "cvssp/audioldm2") == new


def test_an_unknown_family_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"StableAudioPipeline, .*, got 'musicgen'"):
        PublishedPipeline("owner/repository", "musicgen")


def test_without_network_or_cache_it_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"model_index\.json of cvssp/audioldm2 is not on this machine"):
        published_loader("audioldm2").load(Hub(), tmp_path)


def _run(script: str, *overrides: str) -> None:
    command = [sys.executable, str(PROJECT_ROOT / script), "device=cpu", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_audioldm2_with_litefocus_and_caching_from_the_command_line(hub: Path, tmp_path: Path) -> None:
    quick = ["system=audioldm2", f"hub_dir={hub}", "steps=3", "duration_seconds=0.3", "prompt=rain"]
    blocks = "blocks=[down_blocks.1,up_blocks.1]"
    both = ["accel=audiocache_local_global", "accel@accel.cache=fora", "accel@accel.attention=litefocus"]
    costs = []
    for name, accel in (("one", ["accel=litefocus", f"accel.{blocks}"]), ("two", [*both, f"accel.attention.{blocks}"])):
        _run("sample.py", *quick, *accel, f"output_dir={tmp_path / name}")
        (record,) = (tmp_path / name).glob("*.json")
        settings = json.loads(record.read_text())["settings"]
        assert settings["macs"] < settings["macs_uncached"]
        costs.append(settings)
    assert costs[1]["macs"] < costs[0]["macs"]
    assert costs[1]["macs_uncached"] == costs[0]["macs_uncached"]


@pytest.mark.slow
def test_calibrate_then_sample_from_the_command_line(hub: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\na dog barks\n")
    model = ["system=stable_audio_open", f"hub_dir={hub}", f"cache_dir={tmp_path}", "steps=4", "duration_seconds=0.3"]
    _run("scripts/calibrate.py", *model, f"prompts={prompts}")
    calibration = tmp_path / "stable_audio_open" / "calibration" / "CosineDPMSolverMultistepScheduler_4.json"
    assert json.loads(calibration.read_text())["num_prompts"] == 2
    _run(
        "sample.py", *model, "prompt=a dog, barking", "num=2", "negative_prompt=rain", "accel=smoothcache",
        "accel.alpha=9", f"output_dir={tmp_path / 'out'}",
    )  # fmt: skip
    waves = sorted((tmp_path / "out").glob("*.wav"))
    for wave in waves:
        info = soundfile.info(wave)
        assert (info.channels, info.frames, info.samplerate) == (2, round(0.3 * 441), 441)
    assert len(waves) == 2
    settings = json.loads(waves[0].with_suffix(".json").read_text())["settings"]
    assert settings["macs"] < settings["macs_uncached"]
    assert (settings["model"], settings["guidance_scale"], settings["num_steps"]) == ("stable_audio_open", 7.0, 4)
    for file in ("index.html", "spectrograms.png"):
        assert (tmp_path / "out" / file).stat().st_size > 0


@pytest.mark.slow
def test_a_papers_table_of_another_sampler_from_the_command_line(hub: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\na dog barks\n")
    model = ["system=stable_audio_open", f"hub_dir={hub}", f"cache_dir={tmp_path}", "steps=4", "duration_seconds=0.3"]
    _run("scripts/calibrate.py", *model, f"prompts={prompts}", "solver=heun")
    calibration = tmp_path / "stable_audio_open" / "calibration" / "heun_4.json"
    assert len(json.loads(calibration.read_text())["timesteps"]) == 7
    table = ["eval_preset=audiocache_heun", f"prompts={prompts}", "accel=audiocache"]
    table += ["accel.calibrate=never", "accel.threshold=0.02"]
    _run("sample.py", *model, *table, f"output_dir={tmp_path / 'out'}")
    first, _ = sorted((tmp_path / "out").glob("*.wav"))
    settings = json.loads(first.with_suffix(".json").read_text())["settings"]
    assert (settings["solver"], settings["num_steps"], settings["guidance_scale"]) == ("heun", 4, 7.0)
    assert settings["macs"] < settings["macs_uncached"]
