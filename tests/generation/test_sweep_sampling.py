"""`scripts/sweep_sampling.py` as a user runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from small_system import CONFIGS

from foley.core.config import PROJECT_ROOT
from foley.system.system import build_system, save_system

pytestmark = pytest.mark.slow


def sweep(folder, *overrides: str) -> subprocess.CompletedProcess:
    save_system(build_system(CONFIGS), folder / "system")
    (folder / "real").mkdir()
    for seed in range(3):
        noise = 0.1 * np.random.default_rng(seed).standard_normal(4000)
        soundfile.write(folder / f"real/{seed}.wav", noise, 2000)
    (folder / "prompts.txt").write_text("rain\na dog barks\nwind\n")
    places = [f"system={folder}/system", f"prompts={folder}/prompts.txt", f"reference={folder}/real"]
    sizes = ["duration_seconds=0.5", "num_prompts=2", "device=cpu", f"features_dir={folder}/features"]
    command = [sys.executable, str(PROJECT_ROOT / "scripts/sweep_sampling.py"), "-m", *places, *sizes, *overrides]
    return subprocess.run(
        [*command, f"hydra.sweep.dir={folder}/out"], capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.parametrize("launcher", [[], ["launcher=local"]], ids=["here", "submitit"])
def test_a_grid_is_reported(tmp_path, launcher):
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = sweep(tmp_path, "steps=1,2", *launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    trials = json.loads((tmp_path / "out/trials.json").read_text())
    assert [(trial["number"], trial["overrides"]["steps"], trial["clips"]) for trial in trials] == [
        (0, "1", 2),
        (1, "2", 2),
    ]
    assert all(trial["frechet_distance"] > 0 < trial["seconds_per_clip"] for trial in trials)
    assert (tmp_path / "out/pareto.png").is_file()


def test_a_sweep_takes_the_student_or_says_that_there_is_none(tmp_path):
    done = sweep(tmp_path, "steps=1", "student=true")
    assert done.returncode != 0
    assert "no student of this system is exported" in done.stderr


def test_a_search_has_two_objectives(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    # Without optuna_sampling, whose caching wants a calibrated system.
    search = ["hydra/sweeper=optuna", "hydra.sweeper.direction=[minimize,minimize]", "hydra.sweeper.n_jobs=1"]
    search += ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=2"]
    done = sweep(tmp_path, *search, "guidance_scale=interval(1, 8)", "steps=choice(1, 2)")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "out/trials.json").read_text())) == 3
    assert "solutions:" in (tmp_path / "out/optimization_results.yaml").read_text()
