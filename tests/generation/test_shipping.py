"""What ships: a system and its student in one folder, of which nothing is stored twice."""

import json
import shutil

import pytest
import torch
from commands import run_command
from small_system import CONFIGS
from test_sample_cli import run_sample
from test_student import STUDENT_CONFIGS

from foley.core.components import CheckpointError
from foley.core.hashing import hash_module
from foley.generation.text_to_audio import TextToAudio
from foley.system.checkpoint import load_trained
from foley.system.system import System, build_system, codec_hashes, load_system, save_system, share_parts, student_of

SHARED = ["text", "codec", "normaliser", "captions.txt"]


@pytest.fixture(scope="module")
def teacher() -> System:
    built = build_system(CONFIGS)
    return System(built.modules, built.process, built.configs, captions=["rain falls"])


@pytest.fixture
def folder(teacher, tmp_path):
    """A system and the student inside it, which has the same parts but for the denoiser."""
    student = build_system(STUDENT_CONFIGS)
    modules = {**teacher.modules, "denoiser": student.modules["denoiser"]}
    both = System(modules, student.process, student.configs, student.consistency, teacher.captions)
    save_system(teacher, tmp_path / "system", torch.float16)
    save_system(both, tmp_path / "system/student", torch.float16)
    assert share_parts(tmp_path / "system/student", tmp_path / "system") == SHARED
    return tmp_path / "system"


def test_a_student_stores_its_denoiser_alone_and_loads_the_rest_from_its_teacher(folder):
    student = student_of(folder)
    assert sorted(path.name for path in student.iterdir()) == ["denoiser", "system.json"]
    assert json.loads((student / "system.json").read_text())["shared"]["codec"] == "../codec"
    first, second = load_system(folder), load_system(student)
    for name in ("text", "codec", "normaliser"):
        assert hash_module(first.modules[name]) == hash_module(second.modules[name])
    assert second.captions == ["rain falls"]
    assert codec_hashes(student) == codec_hashes(folder)
    assert TextToAudio(second).generate(["rain falls"], 0.2).settings["solver"] == "consistency"


def test_the_pair_may_move_together(folder, tmp_path):
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert load_system(student_of(moved)).consistency


def test_a_shared_part_that_was_altered_is_refused(folder, teacher):
    other = build_system(CONFIGS)
    save_system(other, folder, torch.float16)
    with pytest.raises(CheckpointError, match=r"\.\./.*model.safetensors is missing or is not the file"):
        load_system(student_of(folder))


def test_different_parts_are_kept(teacher, tmp_path):
    save_system(teacher, tmp_path / "a")
    save_system(build_system(CONFIGS), tmp_path / "b")
    assert share_parts(tmp_path / "b", tmp_path / "a") == ["normaliser"]  # which starts as the identity
    assert load_system(tmp_path / "b").modules.keys() == teacher.modules.keys()


def test_a_system_without_student_says_so(folder):
    with pytest.raises(CheckpointError, match="no student of this system"):
        student_of(student_of(folder))


@pytest.mark.slow
def test_sample_takes_the_student(folder, tmp_path):
    done = run_sample(
        "prompt=rain", "duration_seconds=0.2", f"system={folder}", "student=true", f"output_dir={tmp_path}/x"
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(next((tmp_path / "x").glob("*.json")).read_text(encoding="utf-8"))["settings"]
    assert (settings["solver"], settings["ckpt"]) == ("consistency", str(folder / "student"))


def test_export_writes_captions_and_shares(folder, tmp_path):
    overrides = [f"ckpt={student_of(folder)}", "dtype=float16", f"share_with={folder}"]
    run_command("script/export_system", *overrides, f"output_dir={folder}/copy")
    assert sorted(path.name for path in (folder / "copy").iterdir()) == ["denoiser", "system.json"]
    assert hash_module(load_system(folder / "copy").modules["denoiser"]) == hash_module(
        load_system(student_of(folder)).modules["denoiser"]
    )


def test_the_card_says_what_is_in_the_folder_and_how_it_came_about(folder, tmp_path):
    note = {"command": "python train.py", "seconds": 90.0, "provenance": {"processor": "a small one, 2 threads"}}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/codec.json").write_text(json.dumps(note))
    header = "| source | licence | clips |\n|---|---|---:|\n"
    (folder / "ATTRIBUTION.md").write_text(f"{header}| A | CC0 | 2 |\n| B, b (c) | CC BY 4.0 | 1 |\n| C | CC0 | 3 |\n")
    (tmp_path / "results/digits").mkdir(parents=True)
    scores = {"embedded": {"accuracy": {"all": {"accuracy": 0.955, "n": 200}}}}
    (tmp_path / "results/digits/evaluation.json").write_text(json.dumps(scores))
    overrides = [f"system={folder}", f"training={tmp_path}/notes", f"results_dir={tmp_path}/results"]
    run_command("script/write_card", *overrides)
    card = (folder / "README.md").read_text()
    for line in (
        "| `student/denoiser/` |",
        "| CC0 | 5 |\n| CC BY 4.0 | 1 |",
        "| codec | `python train.py` | 1.5 | a small one, 2 threads |",
        "Spoken digits: 95.5 % of 200 clips",
    ):
        assert line in card
    assert "not in this folder yet" not in card


def test_a_codec_leaves_a_system_alone_and_reads_and_writes_as_there(folder, tmp_path):
    codec = tmp_path / "codec"
    run_command("script/export_system", f"ckpt={folder}", f"output_dir={codec}", "format=codec", "dtype=float16")
    assert {file.name for file in codec.iterdir()} == {"config.json", "model.safetensors"}
    alone, inside = load_trained(codec, "codec"), load_trained(folder, "codec")
    assert hash_module(alone) == hash_module(inside)
    with pytest.raises(ValueError, match="latents=X is of a whole system: leave it out with format=codec"):
        run_command("script/export_system", f"ckpt={folder}", f"output_dir={codec}", "format=codec", "latents=X")
