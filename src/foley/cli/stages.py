"""Stages of a config: commands whose products are kept, and not made again where they were made in this way."""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
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


# ---------------------------------------------------------------- the command


def command_line(command: str) -> list[str]:
    """The words that run `python COMMAND`: a script of what ships, or a module after `-m`.

    >>> command_line("-m pytest -q")[1:]
    ['-m', 'pytest', '-q']
    """
    script, *arguments = shlex.split(command)
    # What an earlier try has left in its folder is of another command, or of other inputs.
    if script in ("train.py", "scripts/encode_latents.py"):
        arguments.append("overwrite=true")
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
    return {"command": f"python {stage.command.replace(f'{PROJECT_ROOT}/', '')}", "inputs": inputs}


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
    return description.items() <= made.items()


def begin(folder: Path, description: dict[str, Any]) -> None:
    """Remove `folder` unless an interruption left it there in this way, and note beside it in what way it is made."""
    begun = folder.with_name(f"{folder.name}.begun.json")
    if not (begun.is_file() and read_json(begun, _NOTE, _MEND) == description):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(begun, description)


def keep(stage: DictConfig, work_dir: Path, keep_dir: Path) -> None:
    """Copy what the repository keeps of a stage, `stage.keep` below `work_dir`, to the same place below `keep_dir`."""
    for pattern in stage.get("keep", ()):
        for source in sorted(work_dir.glob(pattern)):
            target = keep_dir / source.relative_to(work_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


# ---------------------------------------------------------------- within a time, one failure not ending the others


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
