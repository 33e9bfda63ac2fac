"""Preference tuning from the command line: pairs, their training, what samples afterwards, and what is measured."""

import json
from pathlib import Path

import pytest
import torch
from commands import compose_command, run_command
from small_system import CONFIGS
from stirring_parts import stir

from foley.core.config import PROJECT_ROOT
from foley.diffusion.crpo import CRPO
from foley.diffusion.dpo import DiffusionDPO
from foley.generation.text_to_audio import TextToAudio
from foley.reporting.pages import write_page
from foley.system.checkpoint import read_training_checkpoint
from foley.system.system import build_system, save_system
from foley.training.run import train

PROMPTS = ["white noise", "bell", "rain", "wind", "siren", "hum"]
SMALL = ("trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=2")
SMALL += ("callbacks.progress=null", "lr_schedule.warmup_steps=1", "data.batch_size=2", "data.duration_seconds=0.5")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    built = build_system(CONFIGS)
    stir(built.modules["denoiser"])
    folder = tmp_path_factory.mktemp("system")
    save_system(built, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(system: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    rows = [json.dumps({"caption": f"a {label}", "label": label}) for label in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    options = ("num=2", "steps=2", "duration_seconds=0.5", "val_fraction=0.2", f"output_dir={folder / 'pairs'}")
    run_command("script/make_preferences", f"system={system}", f"prompts={folder / 'prompts.jsonl'}", *options)
    return folder / "pairs"


def config(system: Path, codec: Path, pairs: Path, folder: Path, *overrides: str) -> object:
    where = f"system={system}", f"codec_path={codec}", f"data.cache_dir={pairs}", f"paths.output_dir={folder}"
    return compose_command("train", "name=test", *overrides, *where, *SMALL)


@pytest.mark.parametrize(
    ("experiment", "objective", "beta"),
    [("crpo", CRPO, 2000), ("dpo", DiffusionDPO, 2000), ("demo/crpo", CRPO, None), ("demo/dpo", DiffusionDPO, None)],
)
def test_recipes(experiment: str, objective: type, beta: float | None) -> None:
    task = compose_command("train", "name=x", f"experiment={experiment}", "data.cache_dir=x", "system=y").task
    assert task.objective._target_ == f"{objective.__module__}.{objective.__qualname__}"
    assert beta in (None, task.objective.beta)
    assert task.lora is None


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("+lora@task.lora=default", "task.lora.rank=2")])
def test_what_is_tuned_is_a_system_that_samples_and_is_tuned_again(
    system: Path, pairs: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    metrics = train(config(system, system, pairs, tmp_path / "run", "experiment=demo/crpo", *more))
    assert {"train/loss", "train/accuracy", "val/loss", "val/winner_change", "val/loser_change"} <= metrics.keys()
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert not any(key.startswith("reference.") for key in read_training_checkpoint(last)["state_dict"])
    tuned, before = TextToAudio.load(last), TextToAudio.load(system)
    options = {"duration_seconds": 0.5, "num_steps": 2}
    assert not torch.equal(tuned.generate(["rain"], **options).audio, before.generate(["rain"], **options).audio)
    assert not any("lora" in key for key in tuned.denoiser.state_dict())
    train(config(last, system, pairs, tmp_path / "next", "experiment=demo/dpo"))  # the next round begins with it


@pytest.mark.slow
def test_the_benchmark_tells_gains_from_the_first_system(system: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"caption": x, "label": x}) for x in PROMPTS))
    options = (f"prompts={tmp_path / 'prompts.jsonl'}", "steps=2", "duration_seconds=0.5", f"output_dir={tmp_path}")
    run_command("bench/preference", f"systems={{before: {system}, the same: {system}}}", *options)
    before, same = json.loads((tmp_path / "preference.json").read_text())["rows"]
    assert before["n"] == same["n"] == 6
    assert before["reward"] == same["reward"] < 0
    assert (same["gain"], same["gain_low"], same["gain_high"]) == (0, 0, 0)
    assert "gain" not in before


def test_the_page_has_no_figures_before_they_are_measured(tmp_path: Path) -> None:
    write_page(PROJECT_ROOT / "docs/results/templates/personalise.md", tmp_path / "personalise.md")
    assert (tmp_path / "personalise.md").read_text().count("Not measured yet.") == 3
