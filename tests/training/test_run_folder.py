"""Reliability rows 25, 26, 34, 35, 37: one run in a folder, one process at it, and a note of how it ended."""

import json
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException

from foley.cli.overrides import quote_overrides
from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT
from foley.core.locks import LOCK_FILE, FolderInUseError, only_writer
from foley.training import run as training
from foley.training.callbacks.checkpointing import SliceEnded, TrainingInterrupted
from foley.training.checkpoint_io import point_to
from foley.training.run_folder import (
    STATUS_FILE,
    RunExistsError,
    ending,
    find_checkpoint,
    is_main_process,
    resume_command,
    run_folder,
)


def settings(folder: Path, **options) -> DictConfig:
    defaults = {"ckpt_path": None, "ckpt": None, "codec_path": None, "overwrite": False}
    return OmegaConf.create({**defaults, "paths": {"output_dir": str(folder)}, **options})


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A folder with the files of a run, and one that is the user's."""
    folder = tmp_path / "my runs (v1), a=b"
    for name in ("checkpoints/step_000004.ckpt", "samples/step_000004/000_dog.wav", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    point_to(folder / "checkpoints/last.ckpt", folder / "checkpoints/step_000004.ckpt")
    (folder / "metrics.csv").write_text("step,train/loss\n")
    return folder


def test_a_folder_that_holds_a_run_is_refused(old_run: Path) -> None:
    with (
        pytest.raises(RunExistsError, match=r"holds a run already .*ckpt_path=auto .*overwrite=true .*hydra\.run\.dir"),
        run_folder(settings(old_run)),
    ):
        pass
    elsewhere = old_run.parent / "other.ckpt"
    with pytest.raises(RunExistsError), run_folder(settings(old_run, ckpt_path=str(elsewhere))):
        pass


@pytest.mark.parametrize("ckpt_path", ["auto", "checkpoints/step_000004.ckpt"])
def test_a_run_is_gone_on_with(old_run: Path, ckpt_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old_run)
    with run_folder(settings(old_run, ckpt_path=ckpt_path)):
        assert (old_run / "checkpoints/step_000004.ckpt").is_file()


def test_a_start_that_failed_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with run_folder(settings(tmp_path)):
        pass
    with run_folder(settings(tmp_path / "new", ckpt_path="auto")):
        pass


def test_overwriting_removes_the_files_of_the_run_alone(old_run: Path) -> None:
    with run_folder(settings(old_run, overwrite=True)):
        assert {path.name for path in old_run.iterdir()} == {"notes.txt", LOCK_FILE, STATUS_FILE}


@pytest.mark.parametrize("key", ["ckpt", "ckpt_path", "codec_path", "system"])
def test_overwriting_keeps_what_the_run_needs(old_run: Path, key: str) -> None:
    last = old_run / "checkpoints/last.ckpt"
    with (
        pytest.raises(ValueError, match=rf"overwrite=true removes .* and {key}=.*last\.ckpt needs it"),
        run_folder(settings(old_run, overwrite=True, **{key: str(last)})),
    ):
        pass
    assert last.is_file()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path, "a training run"),
        pytest.raises(FolderInUseError, match="another process is writing a training run"),
        run_folder(settings(tmp_path)),
    ):
        pass


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"])
def test_processes_of_other_devices_pass(old_run: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert not is_main_process()
    with only_writer(old_run, "a training run"), run_folder(settings(old_run, overwrite=True)):
        assert (old_run / "metrics.csv").is_file()


def status(folder: Path) -> dict:
    return json.loads((folder / STATUS_FILE).read_text())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "finished"),
        (RuntimeError("out of memory"), "crashed"),
        (SystemExit(1), "crashed"),
        (KeyboardInterrupt(), "interrupted"),
        (TrainingInterrupted(), "interrupted"),
        (SliceEnded(), "interrupted"),
        (SIGTERMException(), "interrupted"),
    ],
)
def test_how_a_run_ends_is_noted(tmp_path: Path, error: BaseException | None, expected: str) -> None:
    assert ending(error) == expected
    with nullcontext() if error is None else pytest.raises(type(error)), run_folder(settings(tmp_path)):
        assert status(tmp_path)["status"] == "running"
        if error is not None:
            raise error
    noted = status(tmp_path)
    assert noted["status"] == expected
    assert noted["resume_command"].endswith(f"ckpt_path=auto hydra.run.dir={tmp_path}")
    assert noted.get("error", "") == (f"{type(error).__name__}: {error}".rstrip(": ") if error else "")


def test_the_command_that_goes_on_is_quoted_for_the_shell_and_understood_by_the_command(old_run: Path) -> None:
    words = shlex.split(resume_command(settings(old_run)))
    assert words == ["foley", "train", "ckpt_path=auto", f"hydra.run.dir={old_run}"]
    (override,) = OverridesParser.create().parse_overrides(quote_overrides(words[-1:]))
    assert override.value() == str(old_run)


def test_the_command_that_goes_on_is_the_one_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setattr(sys, "argv", [str(PROJECT_ROOT / "train.py")])  # as the verb has it too
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/foley", "train", "ckpt=x/train.py"])
    assert resume_command(settings(tmp_path)).startswith("foley train ")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py"])
    assert resume_command(settings(tmp_path)).startswith("python train.py ")


def test_a_changed_setting_takes_the_place_of_the_typed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["seed=1", "trainer.max_steps=500", "overwrite=true"]
    hydra = SimpleNamespace(overrides=SimpleNamespace(task=typed))
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.initialized", lambda: True)
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: hydra)
    words = shlex.split(resume_command(settings(tmp_path), {"trainer.max_steps": 1000}))
    assert words[2:] == ["seed=1", "trainer.max_steps=1000", "ckpt_path=auto", f"hydra.run.dir={tmp_path}"]


def test_a_refused_resume_leaves_the_note_of_the_run(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("seed: 1 in the checkpoint, 2 in this run")

    (old_run / STATUS_FILE).write_text('{"status": "finished"}')
    monkeypatch.setattr(training, "require_resumable", refuse)
    with pytest.raises(CheckpointError, match="seed"):
        training.train(settings(old_run, name="mine", ckpt_path="auto"))
    assert status(old_run) == {"status": "finished"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "the run in"),
        (TrainingInterrupted(), 130, "the run in"),
        (SliceEnded(), 75, "its slice of 8 minutes is over; the run in"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, error: BaseException, code: int, words: str, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr(training, "_train", interrupted)
    with pytest.raises(TrainingInterrupted) as raised:
        training.train(settings(tmp_path, name="mine", slice_minutes=8))
    assert raised.value.code == code
    assert f"{words} {tmp_path} goes on with: foley train ckpt_path=auto hydra.run.dir={tmp_path}" in caplog.text


def test_a_dangling_link_is_refused_with_the_checkpoints_there_are(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").symlink_to("step_000008.ckpt")
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt points to step_000008\.ckpt, which does not exist; there is no"
    ):
        find_checkpoint("auto", tmp_path)
    (folder / "step_000004.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"the checkpoints there are step_000004\.ckpt; give one"):
        find_checkpoint("auto", tmp_path)
    (folder / "last.ckpt").unlink()
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt does not exist; the checkpoints there are step_000004\.ckpt"
    ):
        find_checkpoint("auto", tmp_path)


@pytest.mark.parametrize("error", [OSError(1, "Operation not permitted"), NotImplementedError()])
def test_a_file_system_without_links_gets_a_copy(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "symlink", refuse)
    for step in (4, 8):
        torch.save({"global_step": step}, tmp_path / f"step_{step:06d}.ckpt")
        point_to(tmp_path / "last.ckpt", tmp_path / f"step_{step:06d}.ckpt")
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step_000004.ckpt", "step_000008.ckpt"]
