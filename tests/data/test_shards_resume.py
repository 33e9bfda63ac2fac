"""Shards over ranks and loader processes: nothing twice, nothing lost, and after a kill the exact next batch."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import shard_parts
from shard_parts import TRAIN, VAL, build_data, digest
from torch import distributed, multiprocessing, set_num_threads

from foley.system.checkpoint import read_training_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, on more processes than cores
SCRIPT = Path(shard_parts.__file__)
BATCH = 4


def _module(url: str, rank: int, world_size: int, num_workers: int = 2, epoch: int = 0, consumed: int = 0):
    """The data module of a rank, as a trainer would have it at this place of a run."""
    data = build_data(url, num_workers, world_size)
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, limit_train_batches=1.0, accumulate_grad_batches=1, fit_loop=loop
    )
    data.load_state_dict({"epoch": epoch, "consumed": consumed, "size": TRAIN, "batches": 0})
    return data


def _read(rank: int, url: str, folder: str) -> None:
    set_num_threads(1)  # as loader processes do: other threads are not forked
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data, later = _module(url, rank, 2), _module(url, rank, 2, consumed=2 * 2 * BATCH)
    straight, resumed = (list(module.train_dataloader()) for module in (data, later))
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
    multiprocessing.start_processes(_read, (url, str(tmp_path)), nprocs=2, start_method="fork")
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
    deadline = time.monotonic() + 300
    while min(len(_lines(folder, rank)) for rank in range(devices)) < lines:
        assert child.poll() is None, child.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _resume(url: str, folder: Path, steps: int, devices: int) -> None:
    arguments = [sys.executable, str(SCRIPT), url, str(folder), str(steps), str(devices)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def _uninterrupted(url: str, rank: int, world_size: int, steps: int) -> list[str]:
    """What a run logs that is never stopped; without trainer and loader processes."""
    epochs = (_module(url, rank, world_size, 0, epoch).train_dataloader() for epoch in count())
    batches = islice(chain.from_iterable(epochs), steps)
    return [f"{step} {digest(batch)} {','.join(batch['id'])}" for step, batch in enumerate(batches)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_resumes_with_the_exact_next_batch(tmp_path, devices):
    url, folder = shard_parts.write_clips(tmp_path), tmp_path / "run"
    _kill_after(url, folder, devices, lines=13)
    before = [_lines(folder, rank) for rank in range(devices)]
    start = read_training_checkpoint(folder / "checkpoints/last.ckpt")["global_step"]
    end = max(map(len, before)) + 5
    _resume(url, folder, end, devices)
    for rank, killed in enumerate(before):
        whole, resumed = _uninterrupted(url, rank, devices, end), _lines(folder, rank)[len(killed) :]
        assert killed == whole[: len(killed)]
        assert resumed == whole[start:]
