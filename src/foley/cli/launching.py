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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
_NOTES_SECONDS = 90.0  # folders of a network show what another machine wrote after a minute at most
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
        _launch(waiting, _Launcher.of(settings, cfg.gpus_per_job), cfg, work.__code__.co_filename, notes, output)
    else:
        for number in waiting:
            work(cfg, Shard(number, cfg.shards))
            notes.add(number)
    if cfg.merge and notes.are_complete:
        _merge(cfg, merge, notes)


def _merge(cfg: DictConfig, merge: Merge, notes: ShardNotes) -> None:
    """Merge, and forget the notes: also where results cannot be used, which the same command then looks for anew."""
    try:
        merge(cfg)
    except OSError:  # of the disk: what shards made may do, once there is room
        raise
    except Exception:
        notes.clear()
        raise
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
    """All that shards depend on; what one of another request has done counts for nothing.

    Files that options name count by their state, too: rows that a manifest gained meanwhile would belong to nobody.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    asked = {name: value for name, value in plain.items() if name not in _OURS}
    files = {text: os.stat(text) for text in _texts(asked) if os.path.isfile(text)}
    return [asked, {name: [state.st_size, state.st_mtime_ns] for name, state in files.items()}]


def _texts(plain: Any) -> Iterator[str]:
    """All that plain data holds."""
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, dict | list):
        for part in plain.values() if isinstance(plain, dict) else plain:
            yield from _texts(part)


@dataclass
class ShardJob:
    """A shard as a process of its own: submitit pickles it, and calls it there.

    Args:
        script: the file of the command.
        cfg: of the command, with its shard; not resolved, for the other machine may have other devices.
        hydra: what Hydra knows of the command.
        environment: variables of its place, see `_Launcher.environment`.
    """

    script: str
    cfg: DictConfig
    hydra: Any
    environment: Mapping[str, str]

    def __call__(self) -> str | None:
        """None, or in words why it failed; the traceback is in the job's log."""
        os.environ.update(self.environment)  # before anything asks for a GPU
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
        gpus: of this machine, by the names that CUDA knows, shared out over its processes.
    """

    cluster: str
    parameters: Mapping[str, Any]
    retries: int
    at_once: int
    gpus: Sequence[str]

    @classmethod
    def of(cls, settings: DictConfig, gpus: int) -> "_Launcher":
        """From Hydra's settings of a launcher, which sweeps use too; each job gets so many `gpus`."""
        plain: Any = OmegaConf.to_container(settings, resolve=True)
        known = {name: value for name, value in plain.items() if value is not None}
        cluster = "slurm" if str(known.pop("_target_")).endswith("SlurmLauncher") else "local"
        retries = int(known.pop("max_num_timeout", 0))
        known |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": gpus}
        parameters = {
            name if name in _OF_ANY_CLUSTER else f"{cluster}_{name}": value
            for name, value in known.items()
            if name != "submitit_folder" and (gpus or name != "gpus_per_node")  # a queue without GPUs may know no word
        }
        if cluster == "slurm":
            return cls(cluster, parameters, retries, sys.maxsize, ())
        visible, cpus = _visible_gpus() if gpus else [], int(known.get("cpus_per_task", 1))
        places = len(visible) // gpus if visible else _processors() // cpus
        return cls(cluster, parameters, retries, max(1, places), visible)

    @property
    def threads(self) -> dict[str, str]:
        """Variables of all jobs: libraries read it as they are loaded, so that it must be there before."""
        return {} if self.cluster == "slurm" else {"OMP_NUM_THREADS": str(self.parameters.get("cpus_per_task", 1))}

    def environment(self, place: int) -> dict[str, str]:
        """Of the process that has this place of those that run at once."""
        if self.cluster == "slurm":
            return {}
        each = int(self.parameters.get("gpus_per_node", 0))
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[place * each : (place + 1) * each])}

    def executor(self, folder: Path) -> Any:
        """Of submitit, whose files and logs go into `folder`."""
        import submitit

        retries = {f"{self.cluster}_max_num_timeout": self.retries}
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=self.cluster, **retries)
        executor.update_parameters(**self.parameters)
        return executor


def _visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: who set it means those, not the first ones of the machine."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named[:count] if len(named) >= count and all(named) else [str(number) for number in range(count)]


def _processors() -> int:
    """Of this process."""
    # Not on macOS.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """A block whose processes get these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _launch(
    waiting: Sequence[int], launcher: _Launcher, cfg: DictConfig, script: str, notes: ShardNotes, output: str
) -> None:
    """Have jobs do the shards that are `waiting`; raises ShardsFailedError once all have ended."""
    folder, hydra = Path(HydraConfig.get().runtime.output_dir) / "jobs", _hydra_of_jobs()
    executor = launcher.executor(folder)

    def submit(number: int, place: int) -> Any:
        job_cfg = cfg.copy()
        with open_dict(job_cfg):
            job_cfg.shard, job_cfg.merge = number, False
        return executor.submit(ShardJob(script, job_cfg, hydra, launcher.environment(place)))

    _log.info("%d shards as jobs of %s; their logs are in %s", len(waiting), launcher.cluster, folder)
    with _variables(launcher.threads):
        failed = watch(waiting, submit, min(launcher.at_once, len(waiting)), executor.batch)
    if failed:
        raise ShardsFailedError(describe_failures(failed, notes.count, f"{output}={cfg[output]}"))
    _require_notes(waiting, notes, output)


def _require_notes(numbers: Sequence[int], notes: ShardNotes, output: str) -> None:
    """Wait for the notes of jobs that ended well; raises ShardsFailedError where this machine never sees them."""
    if not _is_seen(lambda: notes.done() >= set(numbers)):
        unseen = sorted(map(str, set(numbers) - notes.done()))
        raise ShardsFailedError(
            f"{len(unseen)} shards ended well, {first_few(unseen, _NAMED)}, but {notes.url} holds no note of them: "
            f"give as {output}= a folder that all machines see, or a URL, and leave its inputs as they are meanwhile"
        )


def require_index_of_shards(cfg: DictConfig, is_there: Callable[[], bool]) -> None:
    """As `merge` of what its last shard completes: raises ShardsFailedError where each has left it to another one.

    Two that end at once on two machines may not see each other's last file.
    """
    if cfg.shards > 1 and not _is_seen(is_there):
        raise ShardsFailedError(f"{cfg.output_dir} holds no index of all that it holds: the same command writes it")


def _is_seen(is_there: Callable[[], bool]) -> bool:
    """Whether it is there, at the latest when folders of a network show what other machines wrote."""
    patience = time.monotonic() + _NOTES_SECONDS
    while not (seen := is_there()) and time.monotonic() < patience:
        time.sleep(_POLL_SECONDS)
    return seen


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


def describe_failures(failed: Mapping[int, str], count: int, output: str) -> str:
    """Which shards failed and why, and the command that goes on: the one that was typed, into the same `output`.

    Args:
        output: the option of it; a folder that nobody named would be another one the next time.
    """
    named = [f"  shard {number}: {reason}" for number, reason in sorted(failed.items())[:_NAMED]]
    more = [f"  and {len(failed) - _NAMED} more"] if len(failed) > _NAMED else []
    named_by_user = any(word.lstrip("+").startswith(f"{output.partition('=')[0]}=") for word in sys.argv[1:])
    own = [] if named_by_user else [output]
    again = shlex.join(["python", within_checkout(sys.argv[0]), *sys.argv[1:], *own])
    numbers = first_few([str(number) for number in sorted(failed)], _NAMED)
    head = f"{len(failed)} of {count} shards failed, {numbers}; what they made so far is kept, the others are done:"
    return "\n".join([head, *named, *more, "This goes on with them alone:", f"  {again}"])
