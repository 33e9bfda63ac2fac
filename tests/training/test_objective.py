"""What `train.py` says before and after a training, and what it hands to a sweep."""

import logging
import math
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from foley.core.config import CONFIG_DIR
from foley.training import run
from foley.training.callbacks.non_finite import NonFiniteLossError
from foley.training.run import objective


def config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["name=test", f"paths.output_dir='{folder}'", *overrides])


def diverge(cfg: DictConfig) -> dict[str, float]:
    raise NonFiniteLossError("gradients were not finite")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda train: monkeypatch.setattr(run, "train", train)


def test_folder_and_the_command_that_goes_on_are_told_at_start_and_end(
    tmp_path: Path, training: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    training(lambda cfg: {"val/loss": 2.0})
    folder = tmp_path / "my runs (v1)"
    assert objective(config(folder, "experiment=tiny", "optimized_metric=val/loss")) == 2.0
    told = [record.message for record in caplog.records]
    assert told[0] == f"output folder: {folder}"
    assert told[-2] == f"trained; all of it is in {folder}"
    for line in (told[1], told[-1]):
        words = shlex.split(line.partition(": ")[2])
        assert "ckpt_path=auto" in words
        assert f"hydra.run.dir={folder}" in words


def test_a_training_that_diverges_is_the_worst_of_a_search_and_an_error_alone(
    tmp_path: Path, training: Callable[..., None]
) -> None:
    training(diverge)
    assert objective(config(tmp_path, "experiment=tiny", "optimized_metric=val/loss")) == math.inf
    with pytest.raises(NonFiniteLossError):
        objective(config(tmp_path, "experiment=tiny"))


def test_a_run_that_ends_inside_its_warm_up_is_told_so(
    tmp_path: Path, training: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    training(lambda cfg: {})
    objective(config(tmp_path, "experiment=ezaudio_l", "trainer.max_steps=40"))
    assert "trainer.max_steps=40 and lr_schedule.warmup_steps=5000 the learning rate reaches 1%" in caplog.text
    caplog.clear()
    objective(config(tmp_path, "experiment=ezaudio_l", "trainer.max_steps=40", "lr_schedule.warmup_steps=4"))
    assert "warm-up" not in caplog.text


@pytest.mark.parametrize(
    ("step", "told", "change"),
    [
        (90, "trainer.max_time=00:00:06:00 ended it at step 90; without that limit: ", "trainer.max_time=null"),
        (300, "for twice the steps: ", "trainer.max_steps=600"),
    ],
)
def test_the_command_that_trains_on_lifts_the_limit_that_ended_the_run(
    step: int, told: str, change: str, tmp_path: Path, training: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": step}, tmp_path / "checkpoints/last.ckpt")
    training(lambda cfg: {})
    objective(config(tmp_path, "experiment=tiny", "stage=pretrain"))
    last = caplog.records[-1].message
    assert last.startswith(told)
    assert change in shlex.split(last)


@pytest.mark.parametrize(
    "message",
    [
        "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec)`",
        "The number of training batches (8) is smaller than the logging interval Trainer(log_every_n_steps=10)",
        "Checkpoint directory /tmp/run/checkpoints exists and is not empty.",
        "Found 140 module(s) in eval mode at the start of training.",
        "Using ModelCheckpoint with manual optimization and every_n_train_steps, but no",
    ],
)
def test_what_says_nothing_of_the_run_is_left_out(message: str) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run._hush_lightning()
        warnings.warn(message, stacklevel=1)
        warnings.warn("the loss is odd", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["the loss is odd"]
    assert not logging.getLogger("pytorch_lightning.utilities.rank_zero").isEnabledFor(logging.INFO)
