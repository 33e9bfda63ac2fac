"""Sampling a distilled student: what it takes by itself, what it refuses, and that it is known for what it is."""

import json

import pytest
import torch
from small_system import CONFIGS, training_checkpoint
from stirring_parts import stir
from test_sample_cli import run_sample

from foley.accel.caching.fora import Fora
from foley.core.hashing import hash_module
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import CONSISTENCY
from foley.generation.editing import EditMask
from foley.generation.text_to_audio import TextToAudio
from foley.system.checkpoint import read_training_checkpoint
from foley.system.system import build_system, load_system, save_system

STUDENT_CONFIGS = {
    **CONFIGS,
    "denoiser": {**CONFIGS["denoiser"], "guidance_embedding": True},
    "consistency": {
        "_target_": "foley.diffusion.consistency.Consistency",
        "jump_steps": 20,
        "guidance_range": [5.0, 13.0],
    },
}
HALF_SECOND = {"duration_seconds": 0.5}


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    built = build_system(STUDENT_CONFIGS)
    stir(built.modules["denoiser"])  # zero-initialised layers would hide the text, the time and the scale
    return built


@pytest.fixture(scope="module")
def student(system):
    return TextToAudio(system, max_duration_seconds=5.0)


@pytest.fixture(scope="module")
def student_dir(system, tmp_path_factory):
    directory = tmp_path_factory.mktemp("student")
    save_system(system, directory)
    return directory


def test_a_student_takes_two_consistency_steps_and_a_scale_it_knows_by_itself(student):
    result = student.generate(["rain"], **HALF_SECOND)
    settings = result.settings
    assert (settings["solver"], settings["num_steps"], settings["guidance_scale"]) == (CONSISTENCY, 2, 5.0)
    assert result.audio.shape == (1, 1, 1000)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_each_step_is_one_evaluation_of_one_row_per_prompt(student, num_steps):
    rows = []
    handle = student.denoiser.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    try:
        student.generate(["rain", "wind"], num_steps=num_steps, **HALF_SECOND)
    finally:
        handle.remove()
    assert rows == [2] * num_steps


def test_an_item_is_the_same_alone_and_in_a_batch_and_the_scale_matters(student):
    both = student.generate(["rain", "wind"], num_steps=4, **HALF_SECOND)
    alone = student.generate(["wind"], seeds=[1], num_steps=4, **HALF_SECOND)
    torch.testing.assert_close(both.audio[1:], alone.audio, atol=1e-4, rtol=1e-3)
    louder = student.generate(["wind"], seeds=[1], num_steps=4, guidance=ClassifierFreeGuidance(9.0), **HALF_SECOND)
    assert not torch.allclose(louder.audio, alone.audio, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddim"}, "solver 'ddim' cannot sample this system, a student"),
        ({"guidance": ClassifierFreeGuidance(3.0)}, r"3.0 lies outside \[5.0, 13.0\]"),
        ({"guidance": ClassifierFreeGuidance(6.0, 0.7)}, "no guidance rescale"),
        ({"negative_prompt": "speech"}, "negative_prompt='speech'"),
        ({"num_steps": 51}, "distilled on 50 points"),
        ({"num_steps": 0}, "whole number >= 1"),
    ],
)
def test_what_a_student_cannot_do_is_refused(student, options, message):
    with pytest.raises(ValueError, match=message):
        student.generate(["rain"], **HALF_SECOND, **options)


def test_a_scale_outside_the_trained_range_is_taken_when_told(student):
    guidance = ClassifierFreeGuidance(3.0)
    result = student.generate(["rain"], guidance=guidance, any_guidance_scale=True, **HALF_SECOND)
    assert result.settings["guidance_scale"] == 3.0


def test_an_ordinary_system_refuses_the_solver_of_students():
    with pytest.raises(ValueError, match="samples students only"):
        TextToAudio(build_system(CONFIGS)).generate(["rain"], solver=CONSISTENCY, num_steps=2, **HALF_SECOND)


def test_accelerators_windows_and_variations_work_on_a_student(student, tmp_path):
    plain = student.generate(["rain"], num_steps=4, **HALF_SECOND)
    cached = student.generate(["rain"], num_steps=4, accelerator=Fora(2), **HALF_SECOND)
    assert cached.audio.shape == plain.audio.shape
    assert torch.equal(student.generate(["rain"], num_steps=4, **HALF_SECOND).audio, plain.audio)
    assert student.generate(["rain"], 2.0, window_seconds=0.5, overlap_seconds=0.1).audio.shape == (1, 1, 4000)
    clip = next(plain.write(tmp_path)[0].parent.glob("*.wav"))
    assert student.vary(["rain"], clip, strength=0.5).audio.shape == (1, 1, 1000)
    assert student.edit(["rain"], clip, EditMask(0.1, 0.2)).audio.shape == (1, 1, 1000)


def test_a_saved_student_is_a_student(student, student_dir):
    assert json.loads((student_dir / "system.json").read_text())["consistency"]["guidance_range"] == [5.0, 13.0]
    loaded = TextToAudio.load(student_dir)
    assert torch.equal(loaded.generate(["rain"], **HALF_SECOND).audio, student.generate(["rain"], **HALF_SECOND).audio)


def test_a_training_checkpoint_is_known_as_a_student_by_its_components(system, student, tmp_path):
    path = training_checkpoint(system, tmp_path, hash_module(system.modules["codec"]))
    checkpoint = read_training_checkpoint(path)
    checkpoint["foley"]["components"] |= {name: STUDENT_CONFIGS[name] for name in ("denoiser", "consistency")}
    torch.save(checkpoint, path)
    loaded = TextToAudio(load_system(path))
    assert torch.equal(loaded.generate(["rain"], **HALF_SECOND).audio, student.generate(["rain"], **HALF_SECOND).audio)


@pytest.mark.slow
def test_sample_picks_consistency_sampling_by_itself(student_dir, tmp_path):
    done = run_sample("prompt=rain", "duration_seconds=0.3", f"system={student_dir}", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    settings = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))["settings"]
    assert (settings["solver"], settings["num_steps"], settings["guidance_scale"]) == (CONSISTENCY, 2, 5.0)


@pytest.mark.slow
def test_sample_refuses_a_scale_unless_told(student_dir, tmp_path):
    arguments = ["prompt=rain", "duration_seconds=0.3", "guidance_scale=3", "steps=1", f"system={student_dir}"]
    refused = run_sample(*arguments, f"output_dir={tmp_path}")
    assert refused.returncode != 0
    assert "any_guidance_scale=true" in refused.stderr
    told = run_sample(*arguments, "any_guidance_scale=true", f"output_dir={tmp_path}")
    assert told.returncode == 0, told.stderr
