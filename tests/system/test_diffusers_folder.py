"""A system as the folder of a pipeline of diffusers: opened there it samples the same latents, and comes back whole."""

import copy
import json

import pytest
import torch
from commands import run_command
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from small_system import CONFIGS
from stirring_parts import stir
from tiny_t5 import DIM, save_t5

from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import CosineProcess
from foley.diffusion.sampler import embed, generate_latents
from foley.diffusion.solver import Solver
from foley.generation.pipeline_to_audio import open_generator
from foley.system.diffusers_folder import load_pipeline, save_pipeline, scheduler_of
from foley.system.system import System, build_system, load_system, save_system

FRAMES, SEEDS, STEPS = 25, (3, 4), 5
PROMPTS = ["a dog barks", "rain falls on a roof"]


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def built(kind, folder):
    """A system with random weights: with T5 as EzAudio has it; along a flow; or with a text encoder of ours."""
    configs = copy.deepcopy(CONFIGS)
    if kind == "t5":
        t5 = {"_target_": "foley.models.text.FrozenT5Conditioner", "name_or_path": str(save_t5(folder / "t5"))}
        configs["text"] = {**t5, "dim": DIM, "max_length": 12}
    if kind == "flow":
        configs["process"]["prediction"] = "flow"
    torch.manual_seed(0)
    system = build_system(configs)
    stir(system.modules["denoiser"])  # zero-initialised layers would hide the text and the time
    system.modules["normaliser"].set(torch.ones(4), torch.full((4,), 2.0))
    return System(system.modules, system.process, system.configs, captions=["rain"], trained_seconds=0.5)


@pytest.fixture(scope="module", params=["t5", "flow", "ours"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    system = built(request.param, folder)
    save_pipeline(system, folder / "pipeline")
    return system, folder / "pipeline"


def our_latents(system, scale):
    solver = Solver("euler_flow" if system.process.is_flow else "ddim", STEPS)
    texts = [embed(system.modules["text"], prompts) for prompts in (PROMPTS, [""])]
    return generate_latents(
        system.modules["denoiser"], system.process, *texts, SEEDS, FRAMES, ClassifierFreeGuidance(scale), solver
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_diffusers_opens_it_and_samples_the_same_latents(pair, scale):
    system, folder = pair
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.stack([torch.randn(4, FRAMES, generator=torch_generator("initial noise", seed)) for seed in SEEDS])
    made = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=scale, latents=noise, output_type="latent")
    torch.testing.assert_close(made.audios, our_latents(system, scale), atol=1e-5, rtol=1e-5)


def test_it_comes_back_bit_by_bit(pair):
    system, folder = pair
    back = load_system(folder)
    for name, module in system.modules.items():
        assert hash_module(back.modules[name]) == hash_module(module), name
    assert torch.equal(back.process.alphas_cumprod, system.process.alphas_cumprod)
    assert back.configs["process"] == system.configs["process"]
    assert (back.captions, back.trained_seconds) == (["rain"], 0.5)
    texts = [made.modules["text"](PROMPTS) for made in (system, back)]
    assert torch.equal(texts[0].embeddings, texts[1].embeddings)
    assert "codec" not in load_pipeline(folder, with_codec=False).modules


def test_it_is_a_system_on_the_hub(pair, tmp_path, monkeypatch):
    system, folder = pair
    (tmp_path / "me").mkdir()
    (tmp_path / "me/pipeline").symlink_to(folder)
    digest = hash_module(system.modules["denoiser"])
    assert open_generator("me/pipeline", hub_dir=tmp_path).model_hash == digest
    monkeypatch.setenv("FOLEY_HUB_DIR", str(tmp_path))
    assert hash_module(load_system("me/pipeline").modules["denoiser"]) == digest


@pytest.mark.slow
def test_it_is_a_system_to_every_command(pair, tmp_path):
    system, folder = pair
    made = open_generator(folder).generate(["rain"], num_steps=2)
    assert made.audio.shape == (1, 1, 1000)
    if system.modules["text"].trainable:
        run_command("script/export_system", f"ckpt={folder}", f"output_dir={tmp_path}/system")
        assert hash_module(load_system(tmp_path / "system").modules["denoiser"]) == made.settings["model_hash"]


def test_the_audio_of_the_pipeline_is_as_long_as_asked_for(pair):
    _, folder = pair
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    audio = pipeline("rain", 0.3, num_inference_steps=2, generator=generator).audios
    assert audio.shape == (1, 1, 600)
    assert pipeline("rain", num_inference_steps=1, output_type="pt").audios.shape == (1, 1, 1000)


def test_the_folder_names_its_parts(pair):
    system, folder = pair
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "FoleyPipeline"]
    assert index["denoiser"] == ["foley.system.diffusers_folder", "WrappedComponent"]
    is_t5 = type(system.modules["text"]).__name__ == "FrozenT5Conditioner"
    assert index["text_encoder"][0] == ("transformers" if is_t5 else "foley.system.diffusers_folder")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    if not system.process.is_flow:
        wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        assert wanted.items() <= scheduler.items()
    assert not any("/" in str(value) for value in json.loads((folder / "codec/config.json").read_text()).values())
    assert sorted(file.suffix for file in folder.rglob("*model*.*") if "index" not in file.name) == [".safetensors"] * 4


@pytest.mark.slow
def test_the_export_writes_it(tmp_path):
    save_system(built("ours", tmp_path), tmp_path / "system")
    run_command(
        "script/export_system",
        f"ckpt={tmp_path}/system",
        f"output_dir={tmp_path}/out",
        "format=diffusers",
        "dtype=float16",
    )
    back = load_system(tmp_path / "out")
    original = load_system(tmp_path / "system").modules["denoiser"].state_dict()
    for name, tensor in back.modules["denoiser"].state_dict().items():
        assert torch.equal(tensor, original[name].half().float())


def test_what_diffusers_has_nothing_for_is_refused(tmp_path):
    system = built("ours", tmp_path)
    noise = {"_target_": "foley.models.text.frozen_t5.RandomEmbeddings", "dim": 16, "max_length": 4}
    other = build_system({**CONFIGS, "text": noise})
    with pytest.raises(ValueError, match="takes T5 or a text encoder that trained along, not RandomEmbeddings"):
        save_pipeline(other, tmp_path / "other")
    with pytest.raises(ValueError, match="do not take the steps of CosineProcess"):
        scheduler_of(CosineProcess(), {})
    student = System(system.modules, system.process, system.configs, consistency=object())
    with pytest.raises(ValueError, match="a student samples in steps of its own"):
        save_pipeline(student, tmp_path / "student")
