"""Sweeps at their default folders, by the real sweepers, with an objective that costs nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from foley.cli.sweep_table import read_runs, sweep_table
from foley.core import config
from foley.core.config import CONFIG_DIR

WITH_SWEEPS = sorted(
    str(file.relative_to(CONFIG_DIR).with_suffix(""))
    for file in CONFIG_DIR.rglob("*.yaml")
    if "\n  sweep:" in file.read_text()
)
Multirun = Callable[..., Path]


@pytest.fixture
def multirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Multirun:
    """`multirun(task, *overrides)` sweeps `train.py` over a task, below another root; gives the sweep's folder."""
    monkeypatch.setattr(config, "PROJECT_ROOT", tmp_path)

    def run(task: Callable[[DictConfig], Any], *overrides: str) -> Path:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.multirun("train", task, list(overrides), with_log_configuration=False)
        (folder,) = (tmp_path / "outputs/train/tiny/sweep").iterdir()
        return folder

    return run


@pytest.mark.parametrize("name", WITH_SWEEPS)
def test_the_default_folder_of_a_sweep_is_known_before_its_first_job(name: str) -> None:
    with initialize_config_dir(str((CONFIG_DIR / name).parent), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        HydraConfig.instance().cfg = None
        cfg = hydra.compose_config(Path(name).name, [], RunMode.MULTIRUN, with_log_configuration=False)
        assert "/outputs/" in cfg.hydra.sweep.dir


@pytest.mark.slow
def test_a_grid_at_its_default_folder_ends_with_a_table(
    multirun: Multirun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {1: 0.5, 2: 0.25}
    folder = multirun(lambda cfg: losses[cfg.seed], "experiment=tiny", "optimized_metric=val/loss", "seed=1,2")
    assert folder.parent == tmp_path / "outputs/train/tiny/sweep"
    table = (folder / "sweep.md").read_text()
    assert [line.split("|")[1:5] for line in table.splitlines()] == [
        [" folder ", " seed ", " val/loss ", " outcome "],
        [" --- ", " ---: ", " ---: ", " ---: "],
        [" 1 ", " 2 ", " 0.25 ", " finished "],
        [" 0 ", " 1 ", " 0.5 ", " finished "],
    ]
    assert table in capsys.readouterr().out


def test_a_run_that_fails_is_in_the_table_and_the_grid_goes_on(multirun: Multirun, tmp_path: Path) -> None:
    def task(cfg: DictConfig) -> float:
        if cfg.seed == 1:
            raise ValueError("seed 1 is bad luck")
        return float(cfg.seed)

    with pytest.raises(SystemExit, match=r"1 of 3 runs failed; the first: .*/0/error\.txt"):
        multirun(task, "experiment=tiny", "optimized_metric=val/loss", "seed=1,2,3")
    (folder,) = (tmp_path / "outputs/train/tiny/sweep").iterdir()
    assert [run["number"] for run in read_runs(folder)] == [1, 2, 0]
    assert "| failed: seed 1 is bad luck |" in (folder / "sweep.md").read_text()
    assert 'raise ValueError("seed 1 is bad luck")' in (folder / "0/error.txt").read_text()


@pytest.mark.slow
def test_bad_trials_do_not_end_a_search(multirun: Multirun) -> None:
    """One raises, one diverges; the best of the others is found."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    values = iter([1.0, ZeroDivisionError("no such luck"), math.inf, 0.5, 0.75])

    def task(cfg: DictConfig) -> float:
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return value

    folder = multirun(task, "experiment=tiny", "hparams_search=optuna", "hydra.sweeper.n_trials=5")
    outcomes = {run["number"]: run["outcome"] for run in read_runs(folder)}
    assert outcomes == {0: "finished", 1: "failed: no such luck", 2: "diverged", 3: "finished", 4: "finished"}
    assert OmegaConf.load(folder / "optimization_results.yaml").best_value == 0.5
    assert [run["number"] for run in read_runs(folder)] == [3, 4, 0, 1, 2]


@pytest.mark.slow
def test_a_training_shows_the_last_of_its_metrics(multirun: Multirun) -> None:
    def task(cfg: DictConfig) -> None:
        rows = ["step,train/loss,val/loss", "0,3.0,", "1,2.5,", f"1,,{cfg.seed}"]
        (Path(HydraConfig.get().runtime.output_dir) / "metrics.csv").write_text("\n".join(rows) + "\n")

    folder = multirun(task, "experiment=tiny", "seed=4,3")
    assert [run["values"] for run in read_runs(folder)] == [
        {"val/loss": 3.0, "train/loss": 2.5},
        {"val/loss": 4.0, "train/loss": 2.5},
    ]


def test_a_table_shows_the_settings_that_differ(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        run = {"number": number, "overrides": {"seed": str(number), "experiment": "tiny"}, "values": {}}
        text = json.dumps({**run, "outcome": "finished", "folder": str(number)})
        (tmp_path / f"{number}/run.json").write_text(text)
    assert sweep_table(read_runs(tmp_path)).splitlines()[2:] == ["| 0 | 0 | finished |", "| 1 | 1 | finished |"]
