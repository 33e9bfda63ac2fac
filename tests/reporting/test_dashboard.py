"""Sweeps, their reports, dashboards and launchers."""

import json
import re

import pytest
from hydra import compose, initialize_config_dir

from foley.core.config import PROJECT_ROOT
from foley.metrics.latency import RealTimeFactor
from foley.reporting.dashboard import LAYOUT, MEDIA, build_workspace, read_metrics, write_dashboard
from foley.reporting.sweeps import TRIAL_FILE, pareto_front, write_pareto_report


def trial(number, distance, seconds):
    settings = {"overrides": {"steps": str(number), "solver": "ddim"}, "score": "frechet_distance"}
    return {"number": number, **settings, "frechet_distance": distance, "seconds_per_clip": seconds}


TRIALS = [trial(0, 9.0, 1.0), trial(1, 5.0, 2.0), trial(2, 6.0, 2.0), trial(3, 5.0, 3.0), trial(4, 1.0, 4.0)]


def test_the_front_holds_what_nothing_beats():
    front = pareto_front(TRIALS, "frechet_distance", "seconds_per_clip")
    assert [t["number"] for t in front] == [0, 1, 4]
    assert pareto_front(TRIALS[::-1], "frechet_distance", "seconds_per_clip") == front


def test_a_sweep_is_reported(tmp_path):
    for one in TRIALS:
        (tmp_path / str(one["number"])).mkdir()
        (tmp_path / str(one["number"]) / TRIAL_FILE).write_text(
            json.dumps({**one, **RealTimeFactor(0.5, "AMD EPYC", 8).to_json()})
        )
    write_pareto_report(tmp_path, "seconds_per_clip")
    table = (tmp_path / "pareto.md").read_text()
    assert "| 1 | 5.0000 | 2.0000 | 1 |" in table
    assert "| 0.5 (AMD EPYC, batch 8) |" in table
    assert "| 2 |" not in table
    assert "ddim" not in table
    assert (tmp_path / "pareto.png").stat().st_size > 5_000
    assert len(json.loads((tmp_path / "trials.json").read_text())) == len(TRIALS)


def test_uncached_trials_are_the_yardstick_of_accelerated_ones(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("foley.reporting.sweeps.save_figure", lambda figure, path: lines.extend(figure.axes[0].lines))
    settings = ({"mac_speedup": 1.0}, {"steps": 25}, {"mac_speedup": 2.0}, {"mac_speedup": 3.0}, {})
    for one, known in zip(TRIALS, settings, strict=True):
        (tmp_path / str(one["number"])).mkdir()
        (tmp_path / str(one["number"]) / TRIAL_FILE).write_text(json.dumps({**one, "settings": known}))
    write_pareto_report(tmp_path, "seconds_per_clip")
    (yardstick,) = [line for line in lines if line.get_label() == "fewer steps"]
    assert yardstick.get_xydata().tolist() == [[1.0, 9.0], [2.0, 5.0], [4.0, 1.0]]


def test_a_sweep_without_trials_has_no_report(tmp_path):
    write_pareto_report(tmp_path, "seconds_per_clip")
    assert not list(tmp_path.iterdir())


METRICS = """epoch,step,train/loss,train/grad_norm,val/loss,val/loss_noise_level_0,val/embedded/frechet_distance
0,0,2.0,1.5,,,
0,1,1.0,0.5,,,
0,1,,,1.25,0.75,30.0
"""


def test_a_run_becomes_a_page(tmp_path):
    run = tmp_path / "run"
    (run / "samples/step_000001").mkdir(parents=True)
    (run / "samples/step_000001/000_dog.wav").touch()
    (run / "metrics.csv").write_text(METRICS)
    assert read_metrics(run / "metrics.csv")["train/loss"] == [(0, 2.0), (1, 1.0)]
    page = write_dashboard(run, tmp_path / "out").read_text()
    assert "| train/grad_norm | 0.5 | 1 |" in page
    assert "| val/loss_noise_level_0 | 0.75 | 1 |" in page
    assert page.count("train/grad_norm") == page.count("| val/embedded/frechet_distance |") == 1
    assert "000_dog.wav" in page
    assert "Memory" not in page
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    with pytest.raises(FileNotFoundError, match=r"logger\.csv"):
        write_dashboard(tmp_path, tmp_path / "out")


def test_every_metric_has_one_place():
    logged = ["train/loss", "train/discriminator", "train/grad_norm_1", "train/skipped_steps", "val/loss", "val/mel"]
    logged += ["val/loss_noise_level_3", "val/panns/frechet_distance", "throughput/clips_per_second", "lr-AdamW/pg1"]
    logged += ["train/kl", "val/kl", "val/si_sdr_db", "val/mel_distance", "val/latent_std", "train/kl_like"]
    logged += ["throughput/audio_seconds_per_second", "memory/peak_mib", "caching/change_attention"]
    patterns = [pattern for panels in LAYOUT.values() for pattern in panels.values()]
    assert [sum(bool(re.match(pattern, name)) for pattern in patterns) for name in logged] == [1] * len(logged)


@pytest.mark.parametrize("name", ["train/kl", "val/kl", "val/si_sdr_db"])
def test_what_is_of_another_size_has_an_axis_of_its_own(name):
    (pattern,) = (pattern for panels in LAYOUT.values() for pattern in panels.values() if re.match(pattern, name))
    assert not re.match(pattern, "train/loss")
    assert not re.match(pattern, "val/loss")
    assert not re.match(pattern, "val/mel_distance")


def test_the_workspace_has_the_layout():
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace("someone", "foley")
    assert [section.name for section in workspace.sections] == [*LAYOUT, *MEDIA]
    assert [panel.metric_regex for panel in workspace.sections[0].panels] == list(LAYOUT["Losses"].values())


def composed(name, *overrides):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


def test_sampling_is_searched_with_two_objectives():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    cfg = composed("script/sweep_sampling", "hparams_search=optuna_sampling", "reference=x", "prompts=y")
    assert list(cfg.hydra.sweeper.direction) == ["minimize", "minimize"]
    assert {"guidance_scale", "guidance_rescale", "steps", "accel.threshold"} <= cfg.hydra.sweeper.params.keys()
    assert cfg.hydra.callbacks.pareto._target_ == "foley.reporting.sweeps.ParetoReport"


@pytest.mark.parametrize("entry", [("train", "experiment=tiny", "trainer=ddp"), ("script/sweep_sampling",)])
def test_jobs_go_to_slurm(entry):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    name, *overrides = entry
    devices = ["trainer.devices=8", "trainer.num_nodes=2"] if name == "train" else []
    launcher = composed(name, *overrides, *devices, "launcher=slurm", "hydra.launcher.partition=gpu").hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    expected = (2, 8, 8) if devices else (1, 1, 1)
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == expected
    assert launcher.partition == "gpu"
