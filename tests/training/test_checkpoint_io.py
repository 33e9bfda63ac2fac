"""Checkpoints are written behind training's back, in order, and read once for all ranks of a node."""

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from training_parts import metrics, run

from foley.core.components import CheckpointError
from foley.system.checkpoint import read_training_checkpoint
from foley.training import checkpoint_io
from foley.training.callbacks.monitoring import AppendingCSVLogger
from foley.training.checkpoint_io import AtomicCheckpointIO, Snapshot, make_lean, point_to, stand_for


def test_what_training_changes_after_a_save_does_not_reach_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, save = threading.Event(), torch.save

    def slow(checkpoint, path) -> None:
        assert may_write.wait(60)
        save(checkpoint, path)

    monkeypatch.setattr(torch, "save", slow)
    weight, saving = torch.zeros(3), AtomicCheckpointIO()
    saving.save_checkpoint(
        {"foley": {}, "state_dict": {"weight": weight}, "loops": {"steps": [1]}}, tmp_path / "a.ckpt"
    )
    weight.add_(1)
    assert not (tmp_path / "a.ckpt").exists()
    may_write.set()
    saving.wait()
    assert torch.equal(read_training_checkpoint(tmp_path / "a.ckpt")["state_dict"]["weight"], torch.zeros(3))


def test_after_a_failure_nothing_older_is_removed_and_no_link_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = AtomicCheckpointIO()
    saving.save_checkpoint({"foley": {}}, tmp_path / "old.ckpt")
    saving.later(lambda: point_to(tmp_path / "last.ckpt", tmp_path / "old.ckpt"))
    saving.wait()

    def refuse(checkpoint, path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    saving.save_checkpoint({"foley": {}}, tmp_path / "new.ckpt")
    saving.later(lambda: point_to(tmp_path / "last.ckpt", tmp_path / "new.ckpt"))
    saving.remove_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"No space left.*MiB free"):
        saving.save_checkpoint({"foley": {}}, tmp_path / "newer.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "old.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "old.ckpt"
    saving.wait()  # it was said once


def test_a_snapshot_keeps_types_and_what_is_one_and_reuses_its_memory() -> None:
    weight = torch.randn(4, 4)
    checkpoint = {"a": weight, "same": weight, "turned": weight.T, "rest": [(weight[0], 3), {"name": "x"}]}
    snapshot = Snapshot()
    first = snapshot.of(checkpoint)
    assert first["a"] is first["same"]
    assert torch.equal(first["turned"], weight.T)
    assert first["rest"][0][1] == 3
    assert first["rest"][1] == {"name": "x"}
    place = first["a"].data_ptr()
    weight.add_(1)
    second = snapshot.of(checkpoint)
    assert second["a"].data_ptr() == place
    assert torch.equal(second["a"], weight)


def test_a_twin_outlives_the_checkpoint_that_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, twin = tmp_path / "step.ckpt", tmp_path / "best.ckpt"
    target.write_text("weights")
    twin.write_text("older")
    stand_for(twin, target)
    assert twin.samefile(target)

    def refuse(*_) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    stand_for(twin, target)
    assert not twin.samefile(target)
    target.unlink()
    assert twin.read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_the_best_is_the_periodic_checkpoint_of_its_step_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        AppendingCSVLogger, "after_save_checkpoint", lambda self, callback: told.append(callback.best_model_path)
    )
    run(tmp_path / "whole", 14, every=7)  # validated every 7 steps too
    assert str(tmp_path / "whole/checkpoints/best.ckpt") in told  # which W&B uploads
    best = tmp_path / "whole/checkpoints/best.ckpt"
    step = read_training_checkpoint(best)["global_step"]
    assert best.samefile(best.with_name(f"step_{step:06d}.ckpt"))
    run(tmp_path / "half", 7, every=7)
    assert (tmp_path / "half/checkpoints/best.ckpt").samefile(tmp_path / "half/checkpoints/step_000007.ckpt")
    run(tmp_path / "half", 14, tmp_path / "half/checkpoints/best.ckpt", every=7)
    assert metrics(tmp_path / "half") == metrics(tmp_path / "whole")


def _load(rank: int, path: Path, port: int, answers) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    weight = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"]
    distributed.barrier()
    if rank == 0:
        path.write_bytes(b"overwritten in place")
    distributed.barrier()
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if f"memfd:{path.name}" in line]
    answers.put((rank, float(weight.sum()), bool(mapped)))
    distributed.destroy_process_group()


def test_ranks_of_a_node_share_what_they_read_and_do_not_mind_the_file_overwritten(tmp_path: Path) -> None:
    from lightning_fabric.plugins.environments.lightning import find_free_network_port

    path = tmp_path / "last.ckpt"
    torch.save({"foley": {}, "state_dict": {"weight": torch.ones(100_000)}}, path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    port = find_free_network_port()
    ranks = [context.Process(target=_load, args=(rank, path, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert found == [(0, 100_000.0, True), (1, 100_000.0, True)]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent")
    assert checkpoint_io._held(tmp_path / "absent") is None


@pytest.mark.parametrize("missing", ["memory", "sight"])
def test_ranks_read_the_file_where_they_cannot_share_memory(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None may raise alone, while the others wait for it."""
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"weights")

    def refuse(*_) -> int:
        raise OSError("no memory")

    if missing == "memory":
        monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    other_sees = {True: False}  # the other rank, of another namespace of processes
    monkeypatch.setattr(checkpoint_io, "_gathered", lambda value: [value, other_sees.get(value, value)])
    with checkpoint_io._once_a_node(path) as shared:
        assert shared is None


def test_a_run_goes_on_from_a_lean_checkpoint_of_two_bytes_a_weight(tmp_path: Path) -> None:
    """Averages are weights in training then, moments begin anew, and the place in the data is kept."""
    run(tmp_path, 6)
    last = tmp_path / "checkpoints/last.ckpt"
    whole = read_training_checkpoint(last)
    make_lean(last)
    lean = read_training_checkpoint(last)
    assert last.is_symlink()
    assert whole.keys() - lean.keys() == {"current_weights"}
    for name in whole["current_weights"]:
        assert lean["state_dict"][name].dtype == torch.float16
        torch.testing.assert_close(lean["state_dict"][name].float(), whole["state_dict"][name], rtol=2**-10, atol=1e-6)
    assert [state["state"] for state in lean["optimizer_states"]] == [{}]
    make_lean(last)  # which is lean already
    _, module, log = run(tmp_path, 8, last)
    _, _, uninterrupted = run(tmp_path / "whole", 8)
    assert log.ids == uninterrupted.ids[6:]
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    ended = read_training_checkpoint(last)
    assert ended["global_step"] == 8
    assert {int(moments["step"]) for moments in ended["optimizer_states"][0]["state"].values()} == {2}
