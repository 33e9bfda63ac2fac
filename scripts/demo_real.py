"""`make demo-real`: train, encode, sample, score and report, one command after another, on real recordings."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from foley.checkpoint import write_json
from foley.config import PROJECT_ROOT
from foley.logs import get_logger

log = get_logger(__name__)


def run_stage(name: str, command: str) -> float:
    """Run `python COMMAND` in the checkout's root; returns its seconds, raises SystemExit where it fails."""
    log.info("\n== %s ==\npython %s", name, command)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *shlex.split(command)], cwd=PROJECT_ROOT, check=False).returncode
    if code != 0:
        raise SystemExit(f"stage {name!r} failed with status {code}: python {command}")
    return time.perf_counter() - start


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo_real")
def main(cfg: DictConfig) -> None:
    """Run what has not been run, note the seconds of each stage, and write the report."""
    work_dir = PROJECT_ROOT / cfg.work_dir
    for name, stage in cfg.stages.items():
        note = work_dir / "stages" / f"{name}.json"
        if note.is_file() and (work_dir / stage.product).exists():
            log.info("%s: done before (%s)", name, work_dir / stage.product)
            continue
        seconds = run_stage(name, stage.command)
        portable = stage.command.replace(f"{PROJECT_ROOT}/", "")
        write_json(note, {"command": f"python {portable}", "seconds": round(seconds, 1)})
    run_stage("report", f"scripts/report_first_light.py work_dir={cfg.work_dir} report={cfg.report}")
    log.info("report: %s", Path(PROJECT_ROOT / cfg.report))


if __name__ == "__main__":
    main()
