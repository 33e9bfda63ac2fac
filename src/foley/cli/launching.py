"""A command in shards: one after another in this process, as processes of this machine, or as an array of SLURM jobs.

`shards=64 launcher=slurm` makes 64 jobs of a command. Each does its share of the items, whose journal is the command's
own, and leaves a note in the output that it is done. Where shards fail the others go on; the same command then does
those that are missing. When all are done their results are merged, once.
"""

import copy
import logging
import os
import runpy
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from foley.cli.command import within_checkout
from foley.cli.errors import describe
from foley.core.logs import first_few, get_logger
from foley.core.sharding import ALL, Shard, ShardNotes

_log = get_logger(__name__)

Work = Callable[[DictConfig, Shard], object]
Merge = Callable[[DictConfig], object]

_OURS = ("shard", "merge", "gpus_per_job")  # options that change nothing of what a shard makes
_OF_ANY_CLUSTER = (
    *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node"),
    *("mem_gb", "nodes", "name", "stderr_to_stdout"),
)
"""Parameters of submitit that every cluster has; those of SLURM alone get its name in front."""
_POLL_SECONDS = 0.5
_NAMED = 20  # shards that failed
_LAST_LINES = 3  # of the log of a job that ended without a word


class ShardsFailedError(RuntimeError):
    """Shards that failed; the message names them with their reasons, and the command that goes on."""


def run_shards(cfg: DictConfig, work: Work, merge: Merge = lambda cfg: None, output: str = "output_dir") -> None:
    """Do what the options `shards`, `shard` and `launcher` of a command ask for.

    Args:
        work: does a shard, and finds by itself what of it was done before; of a script, which a job runs again.
        merge: called once, when every shard is done.
        output: the option that says where results go.

    Raises ShardsFailedError, and ValueError for options that do not go together.
    """
    settings = _launcher_settings()
    if settings is None and (cfg.shard, cfg.shards) == (None, 1):
        work(cfg, ALL)
        merge(cfg)
        return
    _refuse(cfg, settings is not None)
    with open_dict(cfg):
        cfg[output] = str(cfg[output])  # a folder that is named by the time gets its name once
    notes = ShardNotes(cfg[output], _request(cfg), cfg.shards)
    done = notes.done()
    asked = range(cfg.shards) if cfg.shard is None else [Shard(cfg.shard, cfg.shards).number]
    waiting = [number for number in asked if number not in done]
    if done:
        _log.info("%d of %d shards are done already; %d to do", len(done), cfg.shards, len(waiting))
    if settings is not None and waiting:
        _launch(waiting, _Launcher.of(settings, cfg.gpus_per_job), cfg, work.__code__.co_filename, notes)
    else:
        for number in waiting:
            work(cfg, Shard(number, cfg.shards))
            notes.add(number)
    if cfg.merge and notes.are_complete:
        merge(cfg)
        notes.clear()


def _launcher_settings() -> DictConfig | None:
    """Those of `launcher=local` and `launcher=slurm`; None for this process, and in a job of a sweep (-m)."""
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return None
    settings = HydraConfig.get()
    chosen = settings.runtime.choices.get("launcher")
    return None if chosen in (None, "none") else settings.launcher


def _refuse(cfg: DictConfig, launched: bool) -> None:
    Shard(0, cfg.shards)
    if cfg.get("overwrite"):
        raise ValueError(
            f"overwrite=true with shards={cfg.shards} would remove what other shards make: remove the folder first"
        )
    devices = 1 if cfg.get("trainer") is None else cfg.trainer.get("devices", 1)
    if devices not in (1, "1") and (launched or cfg.shard is None):
        raise ValueError(f"trainer.devices={devices}: a shard is one process; give trainer.devices=1, and more shards=")


def _request(cfg: DictConfig) -> Any:
    """All that shards depend on; what one of another request has done counts for nothing."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return {name: value for name, value in plain.items() if name not in _OURS}


@dataclass
class ShardJob:
    """A shard as a process of its own: submitit pickles it, and calls it there.

    Args:
        script: the file of the command.
        cfg: of the command, with its shard; not resolved, for the other machine may have other devices.
        hydra: what Hydra knows of the command.
        environment: variables that are set before anything is loaded.
    """

    script: str
    cfg: DictConfig
    hydra: Any
    environment: Mapping[str, str]

    def __call__(self) -> str | None:
        """None, or in words why it failed; the traceback is in the job's log."""
        os.environ.update(self.environment)
        setup_globals()
        HydraConfig.instance().cfg = cast(Any, self.hydra)
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        try:
            runpy.run_path(self.script)["main"](self.cfg)
        except Exception as error:  # noqa: BLE001 -- the boundary of the process
            traceback.print_exc()
            return describe(error)
        return None

    def checkpoint(self) -> Any:
        """Back into the queue where the job's time is over: the shard goes on from its journal."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class _Launcher:
    """What starts jobs.

    Args:
        cluster: "slurm", or "local" for processes of this machine.
        parameters: of each job, by submitit's names.
        at_once: jobs that run at a time; of SLURM, which has a queue of its own, all are submitted.
        gpus: of this machine, shared out over its processes.
    """

    cluster: str
    parameters: Mapping[str, Any]
    retries: int
    at_once: int
    gpus: int

    @classmethod
    def of(cls, settings: DictConfig, gpus: int) -> "_Launcher":
        """From Hydra's settings of a launcher, which sweeps use too; each job gets so many `gpus`."""
        known: dict[str, Any] = {str(name): value for name, value in settings.items() if value is not None}
        cluster = "slurm" if str(known.pop("_target_")).endswith("SlurmLauncher") else "local"
        retries = int(known.pop("max_num_timeout", 0))
        known |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": gpus}
        parameters = {
            name if name in _OF_ANY_CLUSTER else f"{cluster}_{name}": value
            for name, value in known.items()
            if name != "submitit_folder"
        }
        if cluster == "slurm":
            return cls(cluster, parameters, retries, sys.maxsize, 0)
        visible, cpus = _visible_gpus() if gpus else 0, int(known.get("cpus_per_task", 1))
        places = visible // gpus if visible else len(os.sched_getaffinity(0)) // cpus
        return cls(cluster, parameters, retries, max(1, places), visible)

    def environment(self, place: int) -> dict[str, str]:
        """Of the process that has this place of those that run at once."""
        if self.cluster == "slurm":
            return {}
        threads = str(self.parameters.get("cpus_per_task", 1))
        each = int(self.parameters.get("gpus_per_node", 0))
        devices = ",".join(map(str, range(place * each, (place + 1) * each))) if self.gpus else ""
        return {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": devices} if self.gpus else {})

    def executor(self, folder: Path) -> Any:
        """Of submitit, whose files and logs go into `folder`."""
        import submitit

        retries = {f"{self.cluster}_max_num_timeout": self.retries}
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=self.cluster, **retries)
        executor.update_parameters(**self.parameters)
        return executor


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _launch(waiting: Sequence[int], launcher: _Launcher, cfg: DictConfig, script: str, notes: ShardNotes) -> None:
    """Have jobs do the shards that are `waiting`; raises ShardsFailedError once all have ended."""
    folder, hydra = Path(HydraConfig.get().runtime.output_dir) / "jobs", _hydra_of_jobs()
    executor = launcher.executor(folder)

    def submit(number: int, place: int) -> Any:
        job_cfg = cfg.copy()
        with open_dict(job_cfg):
            job_cfg.shard, job_cfg.merge = number, False
        return executor.submit(ShardJob(script, job_cfg, hydra, launcher.environment(place)))

    _log.info("%d shards as jobs of %s; their logs are in %s", len(waiting), launcher.cluster, folder)
    if failed := watch(waiting, submit, min(launcher.at_once, len(waiting)), executor.batch):
        raise ShardsFailedError(describe_failures(failed, notes.count))


def _hydra_of_jobs() -> Any:
    """What Hydra knows of this command, but for the launcher: a job launches no more."""
    hydra: Any = copy.deepcopy(HydraConfig.instance().cfg)
    OmegaConf.set_readonly(hydra.hydra, False)
    hydra.hydra.runtime.choices.launcher = "none"
    return hydra


def watch(
    waiting: Sequence[int], submit: Callable[[int, int], Any], at_once: int, batch: Callable[[], Any] = nullcontext
) -> dict[int, str]:
    """Submit the jobs of shards, as many at once as there are places, until all have ended; why some failed, by number.

    Args:
        submit: starts the job of a shard in a place.
        batch: around what is submitted together.

    Jobs that run where this ends early are cancelled.
    """
    queue, free, failed = list(waiting), list(range(at_once)), dict[int, str]()
    running: dict[int, tuple[int, Any]] = {}
    try:
        while queue or running:
            if queue and free:
                with batch():
                    for number, place in zip(queue, free, strict=False):
                        running[number] = place, submit(number, place)
                started = min(len(queue), len(free))
                queue, free = queue[started:], free[started:]
            for number in [number for number, (_, job) in running.items() if job.done()]:
                place, job = running.pop(number)
                free.append(place)
                if reason := _reason(job):
                    failed[number] = reason
                counts = len(waiting) - len(queue) - len(running), len(waiting)
                _log.info("shard %d %s; %d of %d have ended", number, "failed" if reason else "is done", *counts)
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        for _, job in running.values():
            job.cancel()
    return failed


def _reason(job: Any) -> str | None:
    """Why a job failed; None where it did not."""
    if job.exception() is None:
        reason: str | None = job.result()
        return reason
    said = (job.stderr() or "").strip().splitlines()[-_LAST_LINES:]
    return " / ".join([f"it ended without a result ({job.paths.stderr})", *said])


def describe_failures(failed: Mapping[int, str], count: int) -> str:
    """Which shards failed and why, and the command that goes on: the one that was typed."""
    named = [f"  shard {number}: {reason}" for number, reason in sorted(failed.items())[:_NAMED]]
    more = [f"  and {len(failed) - _NAMED} more"] if len(failed) > _NAMED else []
    again = shlex.join(["python", within_checkout(sys.argv[0]), *sys.argv[1:]])
    numbers = first_few([str(number) for number in sorted(failed)], _NAMED)
    head = f"{len(failed)} of {count} shards failed, {numbers}; what they made so far is kept, the others are done:"
    return "\n".join([head, *named, *more, "The same command goes on with them alone:", f"  {again}"])
