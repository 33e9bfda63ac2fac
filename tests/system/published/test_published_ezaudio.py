"""From a folder in the hub's layout to sound."""

import json
import os
import subprocess
import sys

import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from published_files import CODEC, DENOISER, read_published

from foley.core.components import CheckpointError, build_component
from foley.core.config import PROJECT_ROOT
from foley.core.hashing import hash_module
from foley.core.hub import Hub
from foley.diffusion.process import DiffusionProcess
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.checkpoint import published_loader
from foley.system.convert import ezaudio_denoiser, waveform_vae
from foley.system.convert.ezaudio import denoiser_config
from foley.system.convert.waveform_vae import codec_config
from foley.system.published.ezaudio import load_text


def composed(name, *overrides):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose("sample", overrides=[f"system={name}", *overrides])


def built_attributes(config):
    """Every parameter's shape, and the switches that shapes do not show."""
    with torch.device("meta"):
        module = build_component(config)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes, repr(module), getattr(module, "rotary", None) is None


@pytest.mark.parametrize("size", ["l", "xl"])
def test_our_configs_say_what_the_published_ones_say(shared, size):
    official = json.loads((shared / "golden/ezaudio_official_shapes.json").read_text())[size]["config"]
    codec = json.loads((shared / "golden/vae_official_shapes.json").read_text())["config"]
    cfg = composed(f"ezaudio_{size}")
    published = published_loader(f"ezaudio_{size}")
    assert built_attributes(published.configs["denoiser"]) == built_attributes(denoiser_config(official))
    scheme, alpha = published.configs["denoiser"]["modulation"], official["ada_sola_alpha"]
    assert (scheme["rank"], scheme["alpha"]) == (official["ada_sola_rank"], alpha)
    assert published.configs["codec"] == codec_config(codec)
    assert (published.denoiser_file, published.codec_file) == (f"ckpts/s3/ezaudio_s3_{size}.pt", "ckpts/vae/1m.pt")
    text = {"l": "google/flan-t5-large", "xl": "google/flan-t5-xl"}[size]
    assert (published.configs["text"]["name_or_path"], published.configs["text"]["max_length"]) == (text, 100)
    assert (cfg.solver.name, cfg.steps, cfg.guidance_scale) == (None, None, None)  # the system's own defaults
    solver, guidance = GenerationSettings().choose_solver(DiffusionProcess()), GenerationSettings().choose_guidance()
    assert (solver.name, solver.num_steps, guidance.scale, cfg.guidance_rescale) == (
        "ddim",
        50,
        3.0,
        0.0,
    )
    assert cfg.duration_seconds == 10.0


def test_the_system_is_the_published_one_and_is_converted_once(shared, hub_dir, tiny, tmp_path, caplog):
    published = published_loader("ezaudio_l", OmegaConf.from_dotlist(tiny))
    caplog.set_level("INFO", "foley.system.convert")
    system = published.load(Hub(hub_dir), tmp_path / "cache")
    assert caplog.text.count("converting") == 2
    assert hash_module(system.modules["denoiser"]) == hash_module(ezaudio_denoiser(*read_published(shared, DENOISER)))
    assert hash_module(system.modules["codec"]) == hash_module(waveform_vae(*read_published(shared, CODEC)))
    latent = torch.randn(1, 8, 5)
    assert torch.equal(system.modules["normaliser"].denormalise(latent), latent)
    again = published.load(Hub(hub_dir), tmp_path / "cache")
    assert caplog.text.count("converting") == 2
    audio = [TextToAudio(s).generate(["a dog barks"], 0.1, num_steps=2).audio for s in (system, again)]
    assert torch.equal(*audio)

    file = hub_dir / "OpenSound/EzAudio/ckpts/vae/1m.pt"
    save = torch.load(file, weights_only=True)
    torch.save({"state_dict": {key: value + 0.01 for key, value in save["state_dict"].items()}}, file)
    changed = published.load(Hub(hub_dir), tmp_path / "cache")
    assert caplog.text.count("converting") == 3
    assert hash_module(changed.modules["codec"]) != hash_module(system.modules["codec"])


def test_files_that_are_corrupt_or_of_another_size_are_refused(hub_dir, tiny, tmp_path):
    shallower = published_loader("ezaudio_l", OmegaConf.from_dotlist([*tiny, "model.depth=2"]))
    with pytest.raises(CheckpointError, match=r"ezaudio_s3_l\.pt does not fit DiffusionTransformer"):
        shallower.load(Hub(hub_dir), tmp_path / "cache")
    published = published_loader("ezaudio_l", OmegaConf.from_dotlist(tiny))
    (hub_dir / "OpenSound/EzAudio/ckpts/s3/ezaudio_s3_l.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"ezaudio_s3_l\.pt cannot be read safely"):
        published.load(Hub(hub_dir), tmp_path / "cache")


@pytest.mark.parametrize(
    "missing",
    [
        "OpenSound/EzAudio/ckpts/s3/ezaudio_s3_l.pt",
        "OpenSound/EzAudio/ckpts/vae/1m.pt",
        "google/flan-t5-large/config.json",
    ],
)
def test_a_folder_without_a_file_says_where_it_belongs(hub_dir, tiny, tmp_path, missing):
    (hub_dir / missing).unlink()
    published = published_loader("ezaudio_l", OmegaConf.from_dotlist(tiny))
    with pytest.raises(CheckpointError, match=f"{hub_dir / missing} does not exist") as error:
        published.load(Hub(hub_dir), tmp_path / "cache")
    assert "/".join(missing.split("/")[:2]) in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer*", "half of model.safetensors"])
def test_a_text_encoder_whose_files_are_not_whole_is_named(hub_dir, tiny, missing):
    folder = hub_dir / "google/flan-t5-large"
    for file in folder.glob(missing.removeprefix("half of ")):
        whole = file.read_bytes()
        file.unlink()
        if missing.startswith("half of "):
            file.write_bytes(whole[: len(whole) // 2])
    text = published_loader("ezaudio_l", OmegaConf.from_dotlist(tiny)).configs["text"]
    with pytest.raises(CheckpointError, match=f"text encoder {folder}: "):
        load_text(Hub(hub_dir), text)


def run_sample(*overrides, **environment):
    command = [sys.executable, str(PROJECT_ROOT / "sample.py"), "device=cpu", *overrides]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, env=environment)


@pytest.mark.slow
def test_sample_py_takes_the_folder(hub_dir, tiny, tmp_path):
    done = run_sample(
        "system=ezaudio_l", f"hub_dir={hub_dir}", "prompt=a dog barks", "steps=2", "duration_seconds=0.1",
        *(f"+system_overrides.{override}" for override in tiny),
        f"output_dir={tmp_path / 'out'}", FOLEY_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert soundfile.info(next((tmp_path / "out").glob("*.wav"))).frames == 2400
    settings = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["settings"]
    assert (settings["model"], settings["guidance_scale"], settings["solver"]) == ("ezaudio_l", 3.0, "ddim")
    assert len(list((tmp_path / "cache").glob("*/README.md"))) == 2


@pytest.mark.slow
def test_sample_py_without_network_or_cache_says_what_to_put_where(tmp_path):
    done = run_sample(
        "system=ezaudio_xl", "prompt=rain", f"output_dir={tmp_path}", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    )
    assert done.returncode != 0
    for part in (
        "ckpts/s3/ezaudio_s3_xl.pt of OpenSound/EzAudio",
        "https://huggingface.co/OpenSound/EzAudio",
        "DIR/OpenSound/EzAudio/ckpts/s3/ezaudio_s3_xl.pt",
        "hub_dir=DIR",
    ):
        assert part in done.stderr
    # Not both: the second is refused before anything is looked for.
    done = run_sample("model=ezaudio_xl", "ckpt=data/demo", "prompt=rain", f"output_dir={tmp_path}")
    assert "give only one of them" in done.stderr
    assert done.returncode != 0
