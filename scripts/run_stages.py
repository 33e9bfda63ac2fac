"""Run the stages of a config, one command after another; each has a product, which is kept and not made again.

python scripts/run_stages.py --config-name=train_demo
python scripts/run_stages.py --config-name=results effort=quick
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.config import PROJECT_ROOT, SHIPPED_ROOT, relative_to_checkout
from foley.core.files import write_json
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.core.reading import read_json
from foley.reporting.tables import provenance

log = get_logger(__name__)

_NOTE, _MEND = "the note of a stage", "remove it, and the stage is run again"


def run_stage(name: str, command: str) -> float:
    """Run `python COMMAND` where outputs go; returns its seconds, raises SystemExit where it fails."""
    log.info("\n== %s ==\npython %s", name, command)
    start = time.perf_counter()
    script, *arguments = shlex.split(command)
    # What an earlier try has left in its folder is of another command, or of other inputs.
    if script in ("train.py", "scripts/encode_latents.py"):
        arguments.append("overwrite=true")
    line = [sys.executable, str(SHIPPED_ROOT / script), *arguments]
    code = subprocess.run(line, cwd=PROJECT_ROOT, check=False).returncode
    if code != 0:
        raise SystemExit(f"stage {name!r} failed with status {code}: python {command}")
    return time.perf_counter() - start


def describe_stage(stage: DictConfig) -> dict[str, Any]:
    """What a product depends on: the command, and the contents of the stage's inputs, which earlier stages made."""
    missing = [file for file in stage.get("inputs", ()) if not (PROJECT_ROOT / file).is_file()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no such file, but an input of `python {stage.command}`")
    inputs = {relative_to_checkout(file): hash_file(PROJECT_ROOT / file) for file in stage.get("inputs", ())}
    return {"command": f"python {stage.command.replace(f'{PROJECT_ROOT}/', '')}", "inputs": inputs}


def reason_to_leave_out(stage: DictConfig) -> str | None:
    """None for a stage that is to run."""
    if not stage.get("when", True):
        return "not asked for"
    absent = [file for file in stage.get("needs", ()) if not (PROJECT_ROOT / file).is_file()]
    return f"there is no {', '.join(absent)}" if absent else None


def is_done(stage: DictConfig, note: Path, description: dict[str, Any]) -> bool:
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


@command("script/train_demo")
def main(cfg: DictConfig) -> None:
    """Run what has not been run in this way, and note the seconds of each stage and where it ran.

    A stage that goes on where an interruption left it names its folder in `fresh`, which is removed before the stage is
    run in another way.
    """
    work_dir, keep_dir = PROJECT_ROOT / cfg.work_dir, PROJECT_ROOT / cfg.keep_dir
    for name in cfg.only or cfg.stages:
        stage = cfg.stages[name]
        if reason := reason_to_leave_out(stage):
            log.info("%s: left out, %s", name, reason)
            continue
        note, description = keep_dir / "stages" / f"{name}.json", describe_stage(stage)
        if is_done(stage, note, description):
            log.info("%s: done before (%s)", name, stage.product)
            continue
        if stage.get("fresh"):
            begin(PROJECT_ROOT / stage.fresh, description)
        seconds = run_stage(name, stage.command)
        keep(stage, work_dir, keep_dir)
        write_json(note, {**description, "seconds": round(seconds, 1), "provenance": provenance()})
    for last in cfg.then:
        run_stage("at the end", last)


if __name__ == "__main__":
    main()
