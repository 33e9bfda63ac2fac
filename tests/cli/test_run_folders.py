"""Folders of runs: no two runs share one, the processes of one run do."""

import re
from pathlib import Path

import pytest
from commands import compose_command
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from test_overrides import PRIMARY

from foley.cli.command import command
from foley.core.config import CONFIG_DIR, PROJECT_ROOT, run_folder


def compose_all(name: str, *overrides: str) -> DictConfig:
    """The config of a command with Hydra's own part, which names the folder of the run."""
    folder, _, config = name.rpartition("/")
    with initialize_config_dir(str(CONFIG_DIR / folder), version_base="1.3"):
        return compose(config, ["hydra.job.name=it", *overrides], return_hydra_config=True)


def test_two_runs_of_one_second_have_folders_of_their_own():
    first, second = run_folder("samples"), run_folder("samples")
    assert first != second
    date = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
    assert re.fullmatch(rf"{PROJECT_ROOT}/outputs/samples/{date}_[0-9a-f]{{8}}", first)


@pytest.mark.parametrize("name", ["train", "sample", "script/sweep_sampling", "script/calibrate", "bench/caching"])
@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_sweep_and_a_run_at_their_default_folder(name, mode):
    first, second = (compose_all(name).hydra[mode].dir for _ in range(2))
    assert first != second
    assert first.startswith(f"{PROJECT_ROOT}/outputs/")


@pytest.mark.parametrize("name", PRIMARY)
def test_no_sweep_goes_where_hydra_would_put_it(name):
    text = (CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert "sweep:" in text or "/outputs/" in compose_all(name).hydra.sweep.dir


def test_a_config_names_one_folder():
    cfg = compose_all("sample")
    HydraConfig.instance().set_config(cfg)
    assert cfg.hydra.run.dir == cfg.output_dir == cfg.paths.output_dir == HydraConfig.get().run.dir


def test_the_clock_alone_names_no_folder():
    files = [CONFIG_DIR / f"{name}.yaml" for name in PRIMARY]
    assert [file.name for file in files if "${now:" in file.read_text(encoding="utf-8")] == []


def test_the_ranks_of_a_cluster_share_their_folder(monkeypatch):
    for name, value in {"JOB_ID": "77", "STEP_ID": "0", "STEP_NUM_TASKS": "8", "JOB_START_TIME": "1764331805"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folders = []
    for rank in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        folders.append(compose_all("train", "experiment=tiny").hydra.run.dir)
    assert folders[0] == folders[1]
    assert folders[0].endswith("_job77-0-0")
    assert "/outputs/train/tiny/2025-11-28_" in folders[0]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert run_folder("samples") != run_folder("samples")


def test_the_ranks_of_torchrun_share_their_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert run_folder("samples") == run_folder("samples") == f"{PROJECT_ROOT}/outputs/samples/launchabc-0"


def test_a_launch_of_torchrun_without_a_name_has_a_folder_of_its_own_on_one_node_alone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun writes there by default
    folders = []
    for launch, rank in (("x1", 0), ("x1", 1), ("y2", 0)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_q/none_{launch}/attempt_0/{rank}/error.json")
        folders.append(run_folder("samples"))
    assert folders[0] == folders[1] == f"{PROJECT_ROOT}/outputs/samples/launchx1-0"
    assert folders[2] != folders[0]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--rdzv-id=NAME, or hydra\.run\.dir=FOLDER"):
        run_folder("samples")


def test_clips_of_one_command_have_their_own_folder_in_a_sweep():
    assert compose_command("sample").output_dir != compose_command("sample").output_dir


def test_a_training_sweep_at_its_default_folder(monkeypatch, tmp_path):
    """Every job below one folder, whatever the second in which it began."""
    folders = []

    def task(cfg):
        folders.append(Path(cfg.paths.output_dir))

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("foley.core.config.PROJECT_ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "experiment=tiny", "-m", "seed=1,2"])
    command("train")(task)()
    (sweep,) = (tmp_path / "outputs/train/tiny/sweep").iterdir()
    assert folders == [sweep / "0", sweep / "1"]
    assert all((folder / ".hydra/config.yaml").is_file() for folder in folders)
