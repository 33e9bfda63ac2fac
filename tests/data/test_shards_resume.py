"""Shards over ranks and loader processes: nothing twice, nothing lost, and after a kill the exact next batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import shard_parts
import torch
from shard_parts import TRAIN, VAL, build_data, digest
from torch import distributed, multiprocessing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, on more processes than cores
SCRIPT = Path(__file__).with_name("shard_parts.py")
BATCH = 4


def _module(url: str, state: dict | None = None):
    """The data module of this rank, as a trainer would have it at the start of a run."""
    data = build_data(url)
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, limit_train_batches=1.0, fit_loop=loop)
    if state is not None:
        data.load_state_dict(state)
    return data


def _read(rank: int, url: str, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = _module(url)
    state = {"epoch": 0, "consumed": 2 * 2 * BATCH, "size": TRAIN, "batches": 0}
    straight, resumed = (list(module.train_dataloader()) for module in (data, _module(url, state)))
    seen = {
        "train": [id for batch in straight for id in batch["id"]],
        "val": [id for batch in data.val_dataloader() for id in batch["id"]],
        "exact": [digest(batch) for batch in resumed] == [digest(batch) for batch in straight[2:]],
    }
    both: list = [None, None]
    distributed.all_gather_object(both, seen)
    if rank == 0:
        Path(folder, "seen.json").write_text(json.dumps(both))
    distributed.destroy_process_group()


def test_two_ranks_with_two_loader_processes_each_share_the_clips(tmp_path):
    url = shard_parts.write_clips(tmp_path)
    multiprocessing.spawn(_read, (url, str(tmp_path)), nprocs=2)
    ranks = json.loads((tmp_path / "seen.json").read_text())
    train, val = ([id for rank in ranks for id in rank[split]] for split in ("train", "val"))
    assert len(set(train)) == len(train) == TRAIN // (2 * BATCH) * 2 * BATCH
    assert [len(rank["train"]) for rank in ranks] == [20, 20]
    assert sorted(val) == sorted(str(TRAIN + index) for index in range(VAL))
    assert all(rank["exact"] for rank in ranks)


def _lines(folder: Path, rank: int) -> list[str]:
    log = folder / f"rank{rank}.log"
    return log.read_text().splitlines() if log.exists() else []


def _kill_after(url: str, folder: Path, devices: int, lines: int) -> None:
    """Start an endless run and kill all of its processes once every rank has logged so many batches."""
    arguments = [sys.executable, str(SCRIPT), url, str(folder), "1000000", str(devices)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(arguments, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while min(len(_lines(folder, rank)) for rank in range(devices)) < lines:
        assert child.poll() is None, child.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _resume_to(url: str, folder: Path, steps: int, devices: int) -> None:
    arguments = [sys.executable, str(SCRIPT), url, str(folder), str(steps), str(devices)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_with_the_exact_next_batch(tmp_path, devices):
    url = shard_parts.write_clips(tmp_path)
    _kill_after(url, tmp_path / "killed", devices, lines=13)
    checkpoint = torch.load(tmp_path / "killed/checkpoints/last.ckpt", weights_only=True)
    before = [_lines(tmp_path / "killed", rank) for rank in range(devices)]
    start, end = checkpoint["global_step"], max(map(len, before)) + 5
    if devices == 1:
        shard_parts.run(url, tmp_path / "killed", end)
        shard_parts.run(url, tmp_path / "whole", end)
    else:
        _resume_to(url, tmp_path / "killed", end, devices)
        _resume_to(url, tmp_path / "whole", end, devices)
    for rank, killed in enumerate(before):
        whole, resumed = _lines(tmp_path / "whole", rank), _lines(tmp_path / "killed", rank)[len(killed) :]
        assert len(whole) == end
        assert killed == whole[: len(killed)]
        assert resumed == whole[start:]
