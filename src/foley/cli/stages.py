"""Stages of a config: commands whose products are kept, and not made again where they were made in this way."""

import importlib.util
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from foley.core.config import PROJECT_ROOT, SHIPPED_ROOT, relative_to_checkout
from foley.core.files import write_json
from foley.core.hashing import hash_file, hash_json
from foley.core.logs import get_logger
from foley.core.reading import read_json

_log = get_logger(__name__)
_NOTE, _MEND = "the note of a stage", "remove it, and the stage is run again"
_LAST_LINES = 15  # of a failed stage's log, which are shown
_OVERWRITE = ("train.py", "scripts/encode_latents.py", "scripts/pack_training_data.py")

NOT_DONE = os.EX_TEMPFAIL
"""The exit status of a command whose time was over before its work: the same command goes on."""


# ---------------------------------------------------------------- the command


def command_line(command: str, goes_on: bool = False, slice_minutes: float | None = None) -> list[str]:
    """The words that run `python COMMAND`: a script of what ships, or a module after `-m`.

    Args:
        goes_on: with what an interruption has left in its folder; otherwise that is of another command, or of other
            inputs, and overwritten.
        slice_minutes: after which a training that goes on ends, with the status `NOT_DONE`.

    >>> command_line("-m pytest -q")[1:]
    ['-m', 'pytest', '-q']
    """
    script, *arguments = shlex.split(command)
    if not goes_on and script in _OVERWRITE:
        arguments.append("overwrite=true")
    if goes_on and script == "train.py":
        arguments += ["ckpt_path=auto", *([] if slice_minutes is None else [f"slice_minutes={slice_minutes:g}"])]
    return [sys.executable, script if script == "-m" else str(SHIPPED_ROOT / script), *arguments]


def run_within(command: str, limit_seconds: float, output: IO[str], environment: Mapping[str, str]) -> int | None:
    """The status of `python COMMAND`, run where outputs go; None where the limit ended it, with all that it started."""
    process = subprocess.Popen(
        command_line(command),
        cwd=PROJECT_ROOT,
        env={**os.environ, **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its workers and other ranks end with it
    )
    try:
        return process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of what it started, also where this one is interrupted."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------- what is kept


def describe_stage(stage: DictConfig) -> dict[str, Any]:
    """What a product depends on: the command, and the contents of the stage's inputs, which earlier stages made.

    Raises SystemExit for an input that is not there.
    """
    missing = [file for file in stage.get("inputs", ()) if not (PROJECT_ROOT / file).is_file()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no such file, but an input of `python {stage.command}`")
    inputs = {relative_to_checkout(file): hash_file(PROJECT_ROOT / file) for file in stage.get("inputs", ())}
    return {"command": _spaced(f"python {stage.command.replace(f'{PROJECT_ROOT}/', '')}"), "inputs": inputs}


def _spaced(command: str) -> str:
    """With single spaces, whatever options stand empty between."""
    return " ".join(command.split())


def hash_sources(folders: Iterable[str]) -> str:
    """SHA-256 over the text files of folders of what ships: what a proof or a measurement is of."""
    endings = (".py", ".yaml")
    paths = [path for folder in folders for path in (SHIPPED_ROOT / folder).rglob("*") if path.suffix in endings]
    return hash_json({str(path.relative_to(SHIPPED_ROOT)): hash_file(path) for path in paths})


def reason_to_leave_out(stage: DictConfig) -> str | None:
    """None for a stage that is to run."""
    if not stage.get("when", True):
        return "not asked for"
    absent = [file for file in stage.get("needs", ()) if not (PROJECT_ROOT / file).is_file()]
    if absent:
        return f"there is no {', '.join(absent)}"
    return lacking_packages(stage.get("packages", ()))


def lacking_packages(names: Iterable[str]) -> str | None:
    """What to install; None where every package is there.

    >>> lacking_packages(["torch"]), lacking_packages(["torch", "no_such_package"])
    (None, 'it needs no_such_package: pip install no_such_package')
    """
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    return f"it needs {', '.join(lacking)}: pip install {' '.join(lacking)}" if lacking else None


def is_done(stage: DictConfig, note: Path, description: Mapping[str, Any]) -> bool:
    """Whether the product is there and was made in this way."""
    if not (note.is_file() and (PROJECT_ROOT / stage.product).exists()):
        return False
    made: dict[str, Any] = read_json(note, _NOTE, _MEND)
    return description.items() <= {**made, "command": _spaced(made.get("command", ""))}.items()


def begin(folder: Path, description: dict[str, Any]) -> float:
    """Remove `folder` unless an interruption left it there in this way, and note beside it in what way it is made.

    Returns the seconds that were spent on it before, as `interrupt` noted them.
    """
    begun = folder.with_name(f"{folder.name}.begun.json")
    noted: dict[str, Any] = read_json(begun, _NOTE, _MEND) if begun.is_file() else {}
    if description.items() <= noted.items():
        return float(noted.get("seconds", 0))
    shutil.rmtree(folder, ignore_errors=True)
    write_json(begun, description)
    return 0.0


def interrupt(folder: Path, description: dict[str, Any], seconds: float) -> None:
    """Note beside `folder` the seconds that were spent on it so far, for the next `begin`."""
    write_json(folder.with_name(f"{folder.name}.begun.json"), {**description, "seconds": round(seconds, 1)})


def keep(stage: DictConfig, work_dir: Path, keep_dir: Path) -> None:
    """Copy what the repository keeps of a stage, `stage.keep` below `work_dir`, to the same place below `keep_dir`."""
    for pattern in stage.get("keep", ()):
        for source in sorted(work_dir.glob(pattern)):
            target = keep_dir / source.relative_to(work_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


# ---------------------------------------------------------------- within a time, one failure not ending the others


@dataclass(frozen=True)
class Budget:
    """The time of one call, from here on.

    Args:
        minutes: None is all that it takes.
        reserve_seconds: of them that are kept for what begins and ends around the work.
    """

    minutes: float | None
    reserve_seconds: float = 0.0
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """Until the end of all; None is for ever."""
        return None if self.minutes is None else 60 * self.minutes - (time.monotonic() - self.start)

    @property
    def minutes_of_work(self) -> float | None:
        """That are left without the reserve, in whole hundredths, 0 at least; None is for ever."""
        if self.seconds_left is None:
            return None
        return max(0.0, math.floor((self.seconds_left - self.reserve_seconds) / 0.6) / 100)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Args:
        status: passed, kept (it passed before, in this way), failed, timed out, or left out.
        why: of what did not pass.
    """

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""

    @property
    def passed(self) -> bool:
        """Now or before."""
        return self.status in ("passed", "kept")


def attempt(
    name: str,
    stage: DictConfig,
    notes_dir: Path,
    facts: Mapping[str, Any],
    environment: Mapping[str, str],
    seconds_left: float,
    patience: float = 1.0,
) -> Outcome:
    """Run a stage for at most its `limit_seconds`, or what is left; whatever happens to it is its outcome.

    Args:
        notes_dir: gets `NAME.json`, what the product depends on, and `NAME.log`, all that the stage said.
        facts: what a product depends on besides its command and its inputs.
        environment: variables of the command, besides those that are set.
        patience: times its limit.
    """
    if reason := reason_to_leave_out(stage):
        return Outcome(name, "left out", why=reason)
    try:
        description = {**describe_stage(stage), **facts}
    except SystemExit as lacks:
        return Outcome(name, "left out", why=str(lacks))
    note = notes_dir / f"{name}.json"
    if is_done(stage, note, description):
        return Outcome(name, "kept", read_json(note, _NOTE, _MEND)["seconds"])
    if seconds_left <= 0:
        return Outcome(name, "left out", why="no time is left: give the command again, and it goes on from here")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    limit = min(patience * stage.limit_seconds, seconds_left)
    outcome = _run(name, stage, note.with_suffix(".log"), limit, environment)
    if outcome.passed:
        write_json(note, {**description, "seconds": outcome.seconds})
    return outcome


def _run(name: str, stage: DictConfig, log_file: Path, limit: float, environment: Mapping[str, str]) -> Outcome:
    start = time.perf_counter()
    with log_file.open("w", encoding="utf-8") as output:
        status = run_within(stage.command, limit, output, environment)
    seconds = round(time.perf_counter() - start, 1)
    if status is None:
        return Outcome(name, "timed out", seconds, f"after {limit:.0f} s: {relative_to_checkout(str(log_file))}")
    if status == 0 and (PROJECT_ROOT / stage.product).exists():
        return Outcome(name, "passed", seconds)
    _log.info("%s", "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]))
    return Outcome(name, "failed", seconds, f"status {status}: {relative_to_checkout(str(log_file))}")
