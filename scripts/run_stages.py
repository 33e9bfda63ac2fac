"""Run the stages of a config, one command after another; each has a product, which is kept and not made again.

python scripts/run_stages.py --config-name=train_demo
python scripts/run_stages.py --config-name=results effort=quick
"""

import subprocess
import time

from omegaconf import DictConfig

from foley.cli.command import command
from foley.cli.stages import begin, command_line, describe_stage, is_done, keep, reason_to_leave_out
from foley.core.config import PROJECT_ROOT
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.reporting.tables import provenance

log = get_logger(__name__)


def run_stage(name: str, command: str) -> float:
    """Run `python COMMAND` where outputs go; returns its seconds, raises SystemExit where it fails."""
    log.info("\n== %s ==\npython %s", name, command)
    start = time.perf_counter()
    code = subprocess.run(command_line(command), cwd=PROJECT_ROOT, check=False).returncode
    if code != 0:
        raise SystemExit(f"stage {name!r} failed with status {code}: python {command}")
    return time.perf_counter() - start


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
