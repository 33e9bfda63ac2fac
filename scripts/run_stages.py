"""Run the stages of a config, one command after another; each has a product, which is kept and not made again.

python scripts/run_stages.py --config-name=train_demo
python scripts/run_stages.py --config-name=results effort=quick
"""

import subprocess
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from foley.cli.command import command
from foley.cli.stages import (
    NOT_DONE,
    Budget,
    begin,
    command_line,
    describe_stage,
    interrupt,
    is_done,
    keep,
    reason_to_leave_out,
)
from foley.core.config import PROJECT_ROOT, relative_to_checkout
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.core.numbers import NOT_NEGATIVE, POSITIVE, check_choice
from foley.core.parcels import pack, take_up
from foley.reporting.tables import provenance

log = get_logger(__name__)


def run_words(name: str, words: Sequence[str], limit_seconds: float | None = None) -> tuple[bool, float]:
    """Run a command where outputs go: whether it is done, which it is not where its time is over, and its seconds.

    Raises SystemExit where it fails.
    """
    typed = " ".join(["python", *map(relative_to_checkout, words[1:])])
    log.info("\n== %s ==\n%s", name, typed)
    start = time.perf_counter()
    try:
        status = subprocess.run(words, cwd=PROJECT_ROOT, check=False, timeout=limit_seconds).returncode
    except subprocess.TimeoutExpired:
        status = NOT_DONE
    if status not in (0, NOT_DONE):
        raise SystemExit(f"stage {name!r} failed with status {status}: {typed}")
    return status == 0, time.perf_counter() - start


def run_stage(cfg: DictConfig, name: str, description: dict[str, Any], budget: Budget) -> bool:
    """Run a stage as long as there is time, note the seconds of it and where it ran; whether it is done.

    A stage that goes on where an interruption left it names its folder in `fresh`, which is removed before the stage is
    run in another way.
    """
    stage, folder = cfg.stages[name], cfg.stages[name].get("fresh")
    if stage.command.startswith("train.py"):
        resolve_device(cfg.get("device", "auto"))  # or Lightning says it, with much around it
    before = begin(PROJECT_ROOT / folder, description) if folder else 0.0
    words = command_line(stage.command, bool(folder), budget.minutes_of_work)
    done, seconds = run_words(name, words, budget.seconds_left)
    if stage.get("lean") and (PROJECT_ROOT / stage.product).exists():
        from foley.training.checkpoint_io import make_lean

        make_lean(PROJECT_ROOT / stage.product)
    if done:
        keep(stage, PROJECT_ROOT / cfg.work_dir, PROJECT_ROOT / cfg.keep_dir)
        made = {**description, "seconds": round(before + seconds, 1), "provenance": provenance()}
        write_json(PROJECT_ROOT / cfg.keep_dir / "stages" / f"{name}.json", made)
    elif folder:
        interrupt(PROJECT_ROOT / folder, description, before + seconds)
    return done


def run_all(cfg: DictConfig, budget: Budget) -> bool:
    """Run what has not been run in this way, as long as there is time; whether all is done."""
    for name in cfg.only or cfg.stages:
        stage = cfg.stages[name]
        if reason := reason_to_leave_out(stage):
            log.info("%s: left out, %s", name, reason)
            continue
        description = describe_stage(stage)
        if is_done(stage, PROJECT_ROOT / cfg.keep_dir / "stages" / f"{name}.json", description):
            log.info("%s: done before (%s)", name, stage.product)
        elif budget.minutes_of_work == 0 or not run_stage(cfg, name, description, budget):
            log.info("%s: not done, but the time is over; the same command goes on with it", name)
            return False
    for last in cfg.then:
        run_words("at the end", command_line(last))
    return True


def check_options(cfg: DictConfig) -> None:
    """Raises ValueError for what is no stage, and for a time or size that is none."""
    if isinstance(cfg.only, str):
        raise ValueError(f"only={cfg.only}: give a list, only=[{cfg.only}]")
    for name in cfg.only or ():
        check_choice("only", name, cfg.stages)
    if cfg.get("minutes") is not None:
        NOT_NEGATIVE.check("minutes", cfg.minutes)
    NOT_NEGATIVE.check("reserve_seconds", cfg.get("reserve_seconds", 0.0))
    # A file of no byte would leave a parcel of nothing in the place of the work.
    POSITIVE.check("max_file_megabytes", cfg.get("max_file_megabytes", 1))


@command("script/train_demo")
def main(cfg: DictConfig) -> None:
    """Go on from what an earlier call has packed, run the stages within the time, and pack what there is then."""
    check_options(cfg)
    budget = Budget(cfg.get("minutes"), cfg.get("reserve_seconds", 0.0))
    if not cfg.get("packed_dir"):
        run_all(cfg, budget)
        return
    take_up(PROJECT_ROOT / cfg.earlier_dir, PROJECT_ROOT / cfg.work_dir)
    try:
        if run_all(cfg, budget):
            log.info("all is done, in %s", cfg.work_dir)
    finally:
        files = pack(PROJECT_ROOT / cfg.work_dir, PROJECT_ROOT / cfg.packed_dir, round(cfg.max_file_megabytes * 1e6))
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        log.info("packed: %.1f MB in %d files in %s", megabytes, len(files), cfg.packed_dir)


if __name__ == "__main__":
    main()
