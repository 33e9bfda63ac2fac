"""The nodes, called as ComfyUI calls them: against a stub of the two modules of it that they ask for."""

import sys
from types import ModuleType

import pytest
import torch
from small_system import CONFIGS, STEPS

from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.options import OPTION_NUMBERS
from foley.generation.text_to_audio import TextToAudio
from foley.serving import comfyui
from foley.serving.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from foley.system.system import build_system

TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "AUDIO", "FOLEY_SYSTEM", "FOLEY_ADAPTERS"}


class InterruptedByUserError(Exception):
    """Stands for ComfyUI's own."""


@pytest.fixture
def comfy(monkeypatch):
    """A package `comfy` whose bar notes what it shows, and which interrupts at the evaluation `at`."""
    package, utils, management = (ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management"))
    package.shown, package.at, package.asked = [], None, 0

    class ProgressBar:
        def __init__(self, total):
            package.shown.append((0, total))

        def update_absolute(self, value, total=None, preview=None):
            package.shown.append((value, total))

    def throw_exception_if_processing_interrupted():
        package.asked += 1
        if package.asked == package.at:
            raise InterruptedByUserError

    utils.ProgressBar = ProgressBar
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    for module in (package, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def inputs_of(name):
    groups = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {key: spec for group in ("required", "optional") for key, spec in groups.get(group, {}).items()}


def call(node_name, /, **given):
    """As ComfyUI's executor does: all inputs by name, in inference mode; what is not given is the widget's default."""
    node = NODE_CLASS_MAPPINGS[node_name]()
    required = node.INPUT_TYPES()["required"]
    widgets = {key: spec[1]["default"] for key, spec in required.items() if len(spec) > 1}
    with torch.inference_mode():
        made = getattr(node, node.FUNCTION)(**{**widgets, **given})
    assert isinstance(made, tuple)
    assert len(made) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return made[0]


def is_audio(value, rate):
    waveform = value["waveform"]
    return set(value) == {"waveform", "sample_rate"} and value["sample_rate"] == rate and waveform.ndim == 3


SHORT = {"steps": STEPS["num_steps"], "guidance_scale": 2.0}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_is_one_by_the_protocol(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert name in NODE_DISPLAY_NAME_MAPPINGS
    assert node.CATEGORY == "foley"
    assert callable(getattr(node, node.FUNCTION))
    assert set(node.RETURN_TYPES) <= TYPES
    assert set(node.INPUT_TYPES()) <= {"required", "optional", "hidden"}
    for key, (kind, *widget) in inputs_of(name).items():
        if isinstance(kind, list):
            assert widget[0]["default"] in kind
        else:
            assert kind in TYPES
        if kind in ("INT", "FLOAT"):
            assert widget[0]["min"] <= widget[0]["default"] <= widget[0]["max"]
            if key in OPTION_NUMBERS and key not in comfyui._OWN:
                assert widget[0]["min"] == (OPTION_NUMBERS[key].least or 0)
                assert widget[0]["max"] == (OPTION_NUMBERS[key].most or comfyui._UNBOUNDED)


def test_sounds_are_those_of_generate_and_the_bar_is_moved(comfy, generator):
    made = call("FoleyGenerate", system=generator, prompt="rain", seed=5, num=2, duration_seconds=0.5, **SHORT)
    assert is_audio(made, generator.sample_rate_hz)
    guided = {"guidance": ClassifierFreeGuidance(2.0), **STEPS}
    own = generator.generate(["rain", "rain"], seeds=[5, 6], **guided)
    assert torch.equal(made["waveform"], own.audio)
    assert not made["waveform"].is_inference()
    assert comfy.shown == [(done, STEPS["num_steps"]) for done in range(STEPS["num_steps"] + 1)]
    assert comfy.asked == STEPS["num_steps"]


def test_an_interruption_ends_the_run_before_the_next_evaluation(comfy, generator):
    comfy.at = 2
    with pytest.raises(InterruptedByUserError):
        call("FoleyGenerate", system=generator, duration_seconds=0.5, accelerator="prediction", **SHORT)
    assert comfy.shown[-1] == (1, STEPS["num_steps"])
    comfy.at = None
    assert is_audio(call("FoleyGenerate", system=generator, duration_seconds=0.5, **SHORT), generator.sample_rate_hz)


def test_what_is_left_to_the_system_is_its_own_choice_and_limits_hold():
    options = {"negative_prompt": "", "accelerator": "none", **comfyui._OWN}
    settings = comfyui._settings(options)
    assert (settings.num_steps, settings.guidance, settings.duration_seconds) == (None, None, None)
    with pytest.raises(ValueError, match=r"guidance_scale=-0\.5: give a number >= 0"):
        comfyui._settings({**options, "guidance_scale": -0.5})


@pytest.mark.parametrize("name", [name for name in comfyui._accelerators() if name != "none"])
def test_each_accelerator_is_made_by_its_config(name):
    assert hasattr(comfyui._accelerator(name), "attach")


def test_an_edit_keeps_samples_and_takes_any_rate_and_channels(comfy, generator):
    rate = generator.sample_rate_hz
    sound = torch.sin(torch.arange(rate) / 9.0).mul(0.5).expand(2, 1, -1)
    own = {"waveform": sound, "sample_rate": rate}
    mask = {"mask_start_seconds": 0.25, "mask_length_seconds": 0.25, "boundary_seconds": 0.5}
    edited = call("FoleyEdit", system=generator, audio=own, **mask, **SHORT)["waveform"]
    assert edited.shape == (2, 1, rate)
    kept = torch.cat([edited[..., : rate // 4], edited[..., rate // 2 :]], dim=-1)
    before = torch.cat([sound[..., : rate // 4], sound[..., rate // 2 :]], dim=-1)
    torch.testing.assert_close(kept, before, atol=2**-15, rtol=0)  # through a file of 16 bits
    assert not torch.equal(edited[0], edited[1])  # the seed goes on
    both = call("FoleyEdit", system=generator, audio=own, **mask, masks="[[0.1, 0.2], [0.5, 0.2]]", **SHORT)["waveform"]
    changed = (both - sound).abs().amax(dim=(0, 1)) > 2**-15
    places = torch.arange(rate) / rate
    made = ((places >= 0.1) & (places < 0.3)) | ((places >= 0.5) & (places < 0.7))
    assert not changed[~made].any()
    assert changed[(places > 0.1) & (places < 0.3)].any()
    assert changed[(places > 0.5) & (places < 0.7)].any()
    with pytest.raises(ValueError, match=r"masks=3: give one pair of seconds for each part"):
        call("FoleyEdit", system=generator, audio=own, **mask, masks="3", **SHORT)
    other = {"waveform": torch.rand(1, 2, 2 * rate) - 0.5, "sample_rate": 2 * rate}
    assert call("FoleyEdit", system=generator, audio=other, **mask, **SHORT)["waveform"].shape == (1, 1, rate)


def test_a_stereo_system_takes_and_gives_both_channels(comfy):
    codec = {**CONFIGS["codec"], "audio_channels": 2}
    stereo = TextToAudio(build_system({**CONFIGS, "codec": codec}))
    rate = stereo.sample_rate_hz
    sound = {"waveform": torch.rand(1, 2, rate) - 0.5, "sample_rate": rate}
    mask = {"mask_start_seconds": 0.25, "mask_length_seconds": 0.25, "boundary_seconds": 0.5}
    edited = call("FoleyEdit", system=stereo, audio=sound, **mask, **SHORT)["waveform"]
    torch.testing.assert_close(edited[..., : rate // 4], sound["waveform"][..., : rate // 4], atol=2**-15, rtol=0)
    assert edited.shape == (1, 2, rate)
    varied = call("FoleyVariation", system=stereo, audio=sound, strength=0.5, **SHORT)["waveform"]
    assert varied.shape == (1, 2, rate)


def test_a_variation_of_no_strength_is_the_sound_through_the_codec(comfy, generator, tmp_path):
    rate = generator.sample_rate_hz
    audio = {"waveform": (torch.rand(1, 1, rate) - 0.5), "sample_rate": rate}
    varied = call("FoleyVariation", system=generator, audio=audio, strength=0.0, **SHORT)
    assert is_audio(varied, rate)
    assert varied["waveform"].shape == (1, 1, rate)
    again = call("FoleyVariation", system=generator, audio=audio, strength=0.0, seed=9, **SHORT)
    assert torch.equal(again["waveform"], varied["waveform"])


def test_a_system_is_loaded_with_its_chain_of_adapters_and_anew_where_it_changed(monkeypatch, tmp_path):
    opened = {}
    monkeypatch.setattr(comfyui, "open_generator", lambda system, device, adapters: opened.update(locals()))
    first = call("FoleyUseAdapter", path="a", scale=0.5)
    both = call("FoleyUseAdapter", path="b", adapters=first)
    call("FoleyLoadSystem", name="folder", device="cpu", adapters=both)
    assert opened["adapters"] == [{"path": "a", "scale": 0.5}, {"path": "b", "scale": 1.0}]
    changed = NODE_CLASS_MAPPINGS["FoleyLoadSystem"].IS_CHANGED
    file = tmp_path / "last.ckpt"
    assert changed(str(file), "cpu") == 0.0
    file.write_text("weights")
    assert changed(str(file), "cpu") == changed(str(tmp_path), "cpu") > 0
    assert NODE_CLASS_MAPPINGS["FoleyUseAdapter"].IS_CHANGED(str(tmp_path), 1.0) == changed(str(tmp_path), "cpu")


@pytest.mark.slow
def test_what_ships_is_loaded_and_its_weights_can_be_written_to():
    system = call("FoleyLoadSystem", device="cpu")
    assert isinstance(system, TextToAudio)
    assert not next(system.denoiser.parameters()).is_inference()
