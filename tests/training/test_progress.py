"""What a run says of how far it is."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.callbacks import Timer
from training_parts import TinyData, build_module, run

from foley.training.callbacks import progress
from foley.training.callbacks.progress import StepProgress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def at(step: int, total: float, callbacks: Sequence[Any] = (), first: int = 0) -> StepProgress:
    """The bar of a run at this step that began at `first`, 100 s ago where the clock is the test's."""
    bar = StepProgress()
    metrics = {"train/loss": 0.51234}
    bar._trainer = SimpleNamespace(
        global_step=step, estimated_stepping_batches=total, callbacks=list(callbacks), progress_bar_metrics=metrics
    )
    bar._first_step = first
    return bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_steps_are_counted_with_rate_and_time_left(clock: Clock) -> None:
    bar = at(200, 1200)
    assert bar.describe() == "step 200 of 1200, 2.00 steps/s, 0:08:20 left, train/loss 0.5123"
    assert bar.share_done() == 200 / 1200


def test_a_resumed_run_counts_on_and_its_rate_is_of_the_steps_since(clock: Clock) -> None:
    assert at(300, 500, first=250).describe() == "step 300 of 500, 0.50 steps/s, 0:06:40 left, train/loss 0.5123"
    assert at(250, 500, first=250).describe() == "step 250 of 500, train/loss 0.5123"


def test_a_limit_of_time_ends_a_run_that_has_no_last_step(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer({"minutes": 10})
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: 150.0)
    bar = at(50, float("inf"), [timer])
    assert bar.describe() == "step 50, 0.50 steps/s, 0:07:30 left, train/loss 0.5123"
    assert bar.share_done() == 0.25
    assert at(50, 60, [timer]).describe().startswith("step 50 of 60, 0.50 steps/s, 0:00:20 left")
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: 601.0)  # in the last step
    assert at(50, 60, [timer]).describe().startswith("step 50 of 60, 0.50 steps/s, 0:00:00 left")
    assert at(50, -1).describe() == "step 50, 0.50 steps/s, train/loss 0.5123"


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_is_followed_by_its_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture, accumulated: int) -> None:
    """Six steps and four more of the resumed run: epochs of five batches, of two steps where two batches make one."""
    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulated}
    for before, last in ((0, 6), (6, 10)):
        bar = StepProgress(log_every_seconds=0.0)
        kept = tmp_path / "checkpoints/last.ckpt"
        resumed = kept if before else None
        caplog.clear()
        trainer, _, _ = run(tmp_path, last, resumed, build_module(), TinyData(), [bar], progress_bar=True, **options)
        lines = [record.message for record in caplog.records if record.name == progress.__name__]
        steps = [int(line.removeprefix("validating, ").split()[1]) for line in lines]
        assert all(f" of {last}" in line for line in lines)
        assert steps == sorted(steps)
        assert set(steps) - {before} == set(range(before + 1, last + 1))
        assert trainer.global_step == last
