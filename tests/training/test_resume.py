"""Reliability rows 7-11: a resumed run repeats an uninterrupted one bit for bit, whatever stopped it."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import training_parts
from pytorch_lightning.utilities.exceptions import SIGTERMException
from training_parts import BatchLog, TinyData, build_module, metrics, run

from foley.core.components import CheckpointError
from foley.system.checkpoint import read_training_checkpoint
from foley.training.callbacks import checkpointing
from foley.training.callbacks.checkpointing import TrainingInterrupted
from foley.training.callbacks.monitoring import AppendingCSVLogger
from foley.training.callbacks.non_finite import NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on folders that are not empty
SCRIPT = Path(training_parts.__file__)


def assert_same(left, right, path: str = "") -> None:
    """Equal bit for bit, to every leaf."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


def training_state(path: Path) -> dict:
    """All of a checkpoint that training depends on."""
    checkpoint = read_training_checkpoint(path)
    keys = ("state_dict", "current_weights", "optimizer_states", "lr_schedulers", "TinyData", "global_step", "foley")
    return {key: checkpoint[key] for key in keys}


@pytest.mark.parametrize(("num_workers", "resume_step"), [(0, 4), (0, 8), (0, 12), (2, 8)])
def test_resume_is_exact(tmp_path: Path, num_workers: int, resume_step: int) -> None:
    """Five batches an epoch, validation every seven: the steps are in, and next to, both kinds of boundary.

    With workers, which draw ahead, one case is enough.
    """
    _, _, whole = run(tmp_path / "whole", 16, data=TinyData(num_workers=num_workers))
    start = tmp_path / f"whole/checkpoints/step_{resume_step:06d}.ckpt"
    _, _, resumed = run(tmp_path / "resumed", 16, start, data=TinyData(num_workers=num_workers))
    assert resumed.ids == whole.ids[resume_step:]
    assert resumed.losses == whole.losses[resume_step:]
    ends = [training_state(tmp_path / name / "checkpoints/step_000016.ckpt") for name in ("whole", "resumed")]
    assert_same(*ends)


@pytest.mark.parametrize("every", [5, 7])
def test_resume_from_a_boundary(tmp_path: Path, every: int) -> None:
    """A checkpoint of the last batch of an epoch (5), and one at which validation follows (7)."""
    _, _, whole = run(tmp_path / "whole", 16, every=every)
    _, _, resumed = run(tmp_path / "resumed", 16, tmp_path / f"whole/checkpoints/step_{every:06d}.ckpt", every=every)
    assert resumed.ids == whole.ids[every:]
    _, _, twice = run(tmp_path / "twice", 16, tmp_path / f"resumed/checkpoints/step_{2 * every:06d}.ckpt", every=every)
    assert twice.ids == whole.ids[2 * every :]
    ends = [training_state(tmp_path / name / "checkpoints/step_000016.ckpt") for name in ("whole", "resumed")]
    assert_same(*ends)


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    _, _, whole = run(tmp_path / "whole", 13)
    run(tmp_path / "part", 6)
    _, _, rest = run(tmp_path / "part", 13, tmp_path / "part/checkpoints/last.ckpt")
    assert rest.ids == whole.ids[6:]
    assert_same(*(training_state(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "part")))


def test_accumulated_gradients_resume_exactly(tmp_path: Path) -> None:
    _, _, whole = run(tmp_path / "whole", 8, accumulate_grad_batches=2, every=3)
    start = tmp_path / "whole/checkpoints/step_000003.ckpt"
    _, _, resumed = run(tmp_path / "resumed", 8, start, accumulate_grad_batches=2, every=3)
    assert resumed.ids == whole.ids[-len(resumed.ids) :]
    ends = [training_state(tmp_path / name / "checkpoints/step_000008.ckpt") for name in ("whole", "resumed")]
    assert_same(*ends)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (4, 1)])
def test_a_run_goes_on_with_the_same_steps_in_other_batches(tmp_path: Path, before: int, now: int) -> None:
    """Five steps an epoch: the third is inside the first one, and the run ends in the second."""
    _, _, whole = run(tmp_path / "whole", 8, accumulate_grad_batches=before, every=3)
    start = tmp_path / "whole/checkpoints/step_000003.ckpt"
    trainer, _, resumed = run(tmp_path / "resumed", 8, start, accumulate_grad_batches=now, every=3)
    assert len(resumed.ids) == 5 * now
    taken, expected = (
        [sorted(chain(*ids[at : at + batches])) for at in range(first * batches, len(ids), batches)]
        for ids, batches, first in ((resumed.ids, now, 0), (whole.ids, before, 3))
    )
    assert taken == expected
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 8 * now
    last = training_state(tmp_path / "resumed/checkpoints/step_000008.ckpt")["TinyData"]
    assert last == {"epoch": 1, "consumed": 12, "size": 20, "batches": 8 * now, "accumulated": now}


class EndWithinAStep(pl.Callback):
    """At the first of the batches of a step, by a signal or by the clock."""

    def __init__(self, step: int, by_signal: bool) -> None:
        self.step, self.by_signal = step, by_signal

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step and self.by_signal:
            signal.raise_signal(signal.SIGTERM)

    def on_train_batch_end(self, trainer, *_) -> None:
        within = trainer.global_step == self.step and trainer.fit_loop._should_accumulate()
        trainer.should_stop = within and not self.by_signal


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_run_ends_with_whole_steps_of_accumulated_batches(tmp_path: Path, by_signal: bool) -> None:
    """And what it leaves is not written anew within the first step of the run that goes on."""
    options = {"accumulate_grad_batches": 2, "every": 4}
    run(tmp_path / "whole", 8, **options)
    with pytest.raises(SIGTERMException) if by_signal else nullcontext():
        run(tmp_path / "part", 8, callbacks=[EndWithinAStep(3, by_signal)], **options)
    last = tmp_path / "part/checkpoints/step_000004.ckpt"
    left = last.read_bytes()
    run(tmp_path / "part", 8, last, **options)
    assert last.read_bytes() == left
    assert_same(*(training_state(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "part")))


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def start_child(folder: Path, max_steps: int, every: int) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(max_steps), str(every)], env=environment, stderr=subprocess.PIPE
    )


def test_sigterm_leaves_a_checkpoint_and_the_restart_goes_on(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    child = start_child(tmp_path, 1_000_000, every=500_000)
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 20, child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    last = tmp_path / "checkpoints/last.ckpt"
    step = read_training_checkpoint(last)["global_step"]
    run(tmp_path, step + 5, last)
    steps = [int(row["step"]) for row in csv.DictReader(metrics.open()) if row["train/loss"]]
    # Lightning leaves out one number of the log's x axis where the signal came during validation.
    assert len(steps) == step + 5, "one logger run with a row for each step"
    assert steps == sorted(set(steps))
    assert steps[-1] in (step + 4, step + 5)


def test_a_job_is_requeued_after_the_step_and_a_checkpoint(tmp_path: Path) -> None:
    """As submitit does at SIGUSR2, whose handler ends the job at once."""
    checkpoints = tmp_path / "checkpoints"

    class Preempt(pl.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGUSR2)

    def requeue(*_) -> None:
        raise SystemExit(f"left {read_training_checkpoint(checkpoints / 'last.ckpt')['global_step']}")

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit, match="left 4"):
            run(tmp_path, 1000, every=500, callbacks=[Preempt()])
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)


class PressCtrlC(pl.Callback):
    """Sends SIGINT to this process within one step."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", [3, 4, 6])
def test_ctrl_c_leaves_one_checkpoint_and_the_run_goes_on_exactly(tmp_path: Path, step: int) -> None:
    """Inside an epoch, in its last step, and in a step that a validation follows, which is not cut short."""
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path / "whole", 9, every=100)
    with pytest.raises(SIGTERMException):
        run(tmp_path / "part", 9, every=100, callbacks=[PressCtrlC(step)])
    assert signal.getsignal(signal.SIGINT) is before
    checkpoints = tmp_path / "part/checkpoints"
    assert [path.name for path in checkpoints.glob("step_*")] == [f"step_{step + 1:06d}.ckpt"]
    run(tmp_path / "part", 9, checkpoints / "last.ckpt", every=100)
    assert_same(*(training_state(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "part")))
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


class Clock(pl.Callback):
    """A minute a step, which the checkpoints of a run read in the place of the machine's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.minutes = 0
        monkeypatch.setattr(checkpointing, "monotonic", lambda: 60.0 * self.minutes)

    def on_train_batch_end(self, trainer, *_) -> None:
        self.minutes += not trainer.fit_loop._should_accumulate()


@pytest.mark.parametrize(("minutes", "batches"), [(1, 1), (5, 1), (7, 1), (3, 2)])
def test_slices_of_time_are_one_run(tmp_path: Path, monkeypatch, minutes: int, batches: int) -> None:
    """Of 10 steps, with epochs of 5 and validations every 7: slices end inside both, and with their last steps."""
    last, log, clock = tmp_path / "part/checkpoints/last.ckpt", BatchLog(), Clock(monkeypatch)
    options = {"every": 100, "accumulate_grad_batches": batches}
    _, _, whole = run(tmp_path / "whole", 10, **options)
    for end in [*range(minutes, 10, minutes), 10]:
        start = last if last.exists() else None
        with pytest.raises(SIGTERMException) if end < 10 else nullcontext():
            run(tmp_path / "part", 10, start, callbacks=[clock, log], slice_minutes=minutes, **options)
        assert read_training_checkpoint(last)["global_step"] == end
    assert (log.ids, log.losses) == (whole.ids, whole.losses)
    assert_same(*(training_state(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "part")))
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


def test_a_run_whose_folder_has_moved_keeps_its_best_and_leaves_no_older_checkpoints(tmp_path: Path) -> None:
    """As one that goes on on another machine, where the checkout lies elsewhere."""

    def best(trainer: pl.Trainer) -> float:
        return float(trainer.checkpoint_callbacks[0].best_model_score)

    here, there = tmp_path / "here", tmp_path / "there"
    stayed, *_ = run(tmp_path / "stayed", 9, keep_all=False)
    run(here, 8, keep_all=False)
    here.rename(there)
    moved, *_ = run(there, 9, there / "checkpoints/last.ckpt", keep_all=False)
    names = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("there", "stayed")]
    assert names[0] == names[1] == ["best.ckpt", "last.ckpt", "step_000009.ckpt"]
    assert best(moved) == best(stayed)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted) as raised:
        run(tmp_path, 9, every=100, callbacks=[PressCtrlC(3, times=2)])
    assert raised.value.code == 130
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize(("resume_step", "every"), [(4, 4), (7, 7)])
def test_rows_of_a_killed_run_are_not_doubled(tmp_path: Path, resume_step: int, every: int) -> None:
    """The run has logged steps that its newest checkpoint does not know."""
    run(tmp_path, 11, every=every)
    whole = metrics(tmp_path)
    logger = AppendingCSVLogger(str(tmp_path))
    logger.rewind(resume_step)
    assert [row for row in whole if row[0] < resume_step] == metrics(tmp_path)
    run(tmp_path, 11, tmp_path / f"checkpoints/step_{resume_step:06d}.ckpt", every=every)
    assert metrics(tmp_path) == whole
    logger.rewind(0)
    assert metrics(tmp_path) == []


@pytest.mark.slow
def test_sigkill_while_saving_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    child = start_child(tmp_path, 1_000_000, every=1)
    wait_for(lambda: (folder / "last.ckpt").exists() and list(folder.glob(".step_*")), child)
    child.kill()
    child.wait()
    step = read_training_checkpoint(folder / "last.ckpt")["global_step"]
    _, _, log = run(tmp_path, step + 2, folder / "last.ckpt")
    assert len(log.ids) == 2


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 4)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    def refuse(checkpoint, path) -> None:
        Path(path).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(CheckpointError, match=r"No space left.*MiB free"):
        run(tmp_path, 8, tmp_path / "checkpoints/last.ckpt")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    assert read_training_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 4


def test_non_finite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer, module, log = run(tmp_path, 5, data=TinyData(poisoned=frozenset({3})))
    assert sum(loss != loss for loss in log.losses) == 1
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    checkpoint = read_training_checkpoint(tmp_path / "checkpoints/last.ckpt")
    for state in (checkpoint["state_dict"], checkpoint["current_weights"], module.state_dict()):
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert all(slot["step"] == 4 for slot in checkpoint["optimizer_states"][0]["state"].values())


def test_non_finite_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row, up to step 2.*'0/"):
        run(tmp_path, 20, data=TinyData(poisoned=frozenset(range(20))))


def test_an_option_written_out_is_the_default_that_it_names(tmp_path: Path) -> None:
    masking = {"_target_": "foley.models.dit.masking.SpanMask"}
    short, long = build_module(), build_module()
    short.component_configs["masking"] = masking
    long.component_configs["masking"] = {**masking, "span_frames": 10, "ratio": [0.25, 1.0]}
    run(tmp_path, 4, module=short)
    run(tmp_path, 8, tmp_path / "checkpoints/last.ckpt", module=long)
    other = build_module()
    other.component_configs["masking"] = {**masking, "span_frames": 5}
    with pytest.raises(CheckpointError, match=r"masking.span_frames: 10 in the checkpoint, 5 in the run"):
        run(tmp_path, 8, tmp_path / "checkpoints/last.ckpt", module=other)


def test_resuming_with_another_config_lists_the_keys(tmp_path: Path) -> None:
    run(tmp_path, 4)
    other = build_module(context_dim=None)
    with pytest.raises(CheckpointError, match=r"(?s)config components.denoiser.context_dim.*denoiser.cross_attention"):
        run(tmp_path, 8, tmp_path / "checkpoints/last.ckpt", module=other)
