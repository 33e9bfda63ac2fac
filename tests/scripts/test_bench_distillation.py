"""`scripts/bench/distillation.py` on tiny systems: every row, sweep and curve it is asked for."""

import json
from dataclasses import replace

import pytest
import soundfile
import torch
from commands import compose_command, load_command, run_command
from small_system import CONFIGS, training_checkpoint
from test_student import STUDENT_CONFIGS

from foley.core.devices import described_processor
from foley.core.hashing import hash_module
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.features import LabelledAudio, extract_audio
from foley.metrics.judge import FrechetAudioDistance
from foley.system.checkpoint import read_training_checkpoint
from foley.system.system import build_system, save_system


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, its student, and the run in which the student was trained."""
    path = tmp_path_factory.mktemp("systems")
    save_system(build_system(CONFIGS), path / "teacher")
    student = build_system(STUDENT_CONFIGS)
    save_system(student, path / "student")
    (path / "run/checkpoints").mkdir(parents=True)
    file = training_checkpoint(student, path, hash_module(student.modules["codec"]))
    checkpoint = read_training_checkpoint(file)
    checkpoint["foley"]["components"] |= {name: STUDENT_CONFIGS[name] for name in ("denoiser", "consistency")}
    for step in (100, 200):
        torch.save(checkpoint, path / f"run/checkpoints/step_{step:06d}.ckpt")
    (path / "reference").mkdir()
    for number in range(2):
        noise = 0.1 * torch.randn(4800, generator=torch.Generator().manual_seed(number))
        soundfile.write(path / f"reference/{number}.wav", noise.numpy(), 24000)
    (path / "prompts.jsonl").write_text('{"caption": "rain falls", "label": "rain"}\n{"caption": "wind"}\n')
    return path


@pytest.mark.slow
def test_rows_sweep_and_curves(folder, tmp_path):
    overrides = [
        *(f"teacher={folder}/teacher", f"student={folder}/student", f"prompts={folder}/prompts.jsonl"),
        *("teacher_steps=[4,2]", "student_steps=[1,2]", "guidance_scale=6", "guidance_sweep=[5,9]"),
        *(f"+curves.20={folder}/run", "duration_seconds=0.2", "device=cpu", f"output_dir={tmp_path}"),
        f"reference={folder}/reference",
    ]
    run_command("bench/distillation", *overrides)
    results = json.loads((tmp_path / "distillation.json").read_text())
    assert [(row["system"], row["num_steps"]) for row in results["rows"]] == [
        ("teacher", 4), ("teacher", 2), ("student", 1), ("student", 2),
    ]  # fmt: skip
    assert results["rows"][0]["total_speedup"] == 1
    teacher, half, student, more = (row["tmacs"] for row in results["rows"])
    assert (teacher, more) == (pytest.approx(2 * half), pytest.approx(2 * student))  # by the number of steps
    assert student < half / 2  # one evaluation a step, where guidance takes two
    for row in results["rows"]:
        assert row["real_time_factor"] == pytest.approx(row["total_seconds"] / (2 * 0.2))
    assert all(row["denoise_seconds"] > 0 and row["denoise_speedup"] > 0 for row in results["rows"])
    for part in ("rows", "guidance_sweep", "curves"):
        for row in results[part]:
            assert row["real_time_factor"] == pytest.approx(row["total_seconds"] / (2 * 0.2))
            assert (row["machine"], row["batch_size"]) == (described_processor(), 2)
    assert {row["label_accuracy"] for row in results["rows"]} == {None}  # these systems' rate is not the extractor's
    assert [(row["num_steps"], row["guidance_scale"]) for row in results["guidance_sweep"]] == [
        (1, 5), (1, 9), (2, 5), (2, 9),
    ]  # fmt: skip
    assert [(row["k"], row["training_step"], row["num_steps"]) for row in results["curves"]] == [
        (20, 100, 2), (20, 200, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("ablation", ["+curves.20=RUN", "guidance_sweep=[5]", "vggish_dir=WEIGHTS"])
def test_ablations_want_a_set_to_measure_frechet_distances_to(folder, ablation):
    with pytest.raises(ValueError, match="give reference="):
        run_command("bench/distillation", "student=null", f"prompts={folder}/prompts.jsonl", ablation)


def test_at_the_extractors_rate_rows_have_scores(folder):
    bench = load_command("bench/distillation")
    cfg = compose_command("bench/distillation", "student=null", f"prompts={folder}/prompts.jsonl")
    workload = bench["Workload"].build(cfg)
    system = TextToAudio(build_system({**CONFIGS, "codec": {**CONFIGS["codec"], "sample_rate_hz": 24000}}))
    reference = extract_audio([LabelledAudio(torch.randn(4800)) for _ in range(2)], workload.judge.protocol)
    workload = replace(workload, duration_seconds=0.2, judge=replace(workload.judge, reference=reference))
    fad = FrechetAudioDistance(workload.judge.protocol, reference)
    row = replace(workload, fad=fad).measure(system, 2, 3.0)
    assert 0 <= row["label_accuracy"] <= 1
    assert row["frechet_distance"] > 0
    assert row["fad"] == pytest.approx(row["frechet_distance"])  # here of the same protocol
