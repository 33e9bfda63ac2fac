"""Prove and measure on a GPU, within minutes, all that only a GPU can say: kept stages, each with a limit of time.

A stage that fails or runs out of its time does not end the others. What passed in this way on this machine is not run
again, so that a second call goes on where the first one stopped.
"""

import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.cli.stages import Outcome, attempt, hash_sources, keep
from foley.core.config import PROJECT_ROOT
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.reporting.pages import write_page
from foley.reporting.tables import format_rows, provenance

log = get_logger(__name__)
COLUMNS = {"stage": "{name}", "outcome": "{status}", "seconds": "{seconds:.1f}"}


def require_device(name: str) -> dict[str, str]:
    """What names the device; raises ValueError where it is not there, with how to try the check without one."""
    try:
        resolve_device(name)
    except ValueError as error:
        raise ValueError(f"{error}; size=quick device=cpu tries every stage on the CPU") from error
    facts = provenance()
    return {"device": name, "machine": facts.get("gpu", facts["processor"])}


def run_all(cfg: DictConfig, facts: Mapping[str, str]) -> Iterator[Outcome]:
    """Every stage, in the order of their worth, as long as there is time."""
    work_dir, keep_dir, start = PROJECT_ROOT / cfg.work_dir, PROJECT_ROOT / cfg.results_dir / "gpu", time.perf_counter()
    for name in cfg.only or cfg.stages:
        left = cfg.budget_seconds - (time.perf_counter() - start)
        outcome = attempt(name, cfg.stages[name], work_dir / "stages", facts, cfg.environment, left, cfg.patience)
        if outcome.passed:
            keep(cfg.stages[name], work_dir, keep_dir)
        log.info("%-18s %-9s %6.1f s  %s", name, outcome.status, outcome.seconds, outcome.why)
        yield outcome


def write_pages(cfg: DictConfig) -> None:
    """The pages whose rows were measured, into the folder of the results."""
    results_dir = PROJECT_ROOT / cfg.results_dir
    for name in cfg.pages:
        write_page(Path(cfg.templates_dir) / f"{name}.md", results_dir / f"{name}.md")
    log.info("pages: %s", ", ".join(str(results_dir / f"{name}.md") for name in cfg.pages))


@command("script/gpu_check")
def main(cfg: DictConfig) -> None:
    """Ends with SystemExit where something was not proved, once everything else was tried."""
    facts = {**require_device(cfg.device), "code": hash_sources(cfg.code)}
    outcomes = list(run_all(cfg, facts))
    rows = [asdict(outcome) for outcome in outcomes]
    file = PROJECT_ROOT / cfg.results_dir / "gpu" / "stages.json"
    write_json(file, {"stages": rows, "provenance": provenance()})
    write_pages(cfg)
    log.info("\n%s", format_rows(rows, COLUMNS))
    unproved = [outcome.name for outcome in outcomes if cfg.stages[outcome.name].get("proves") and not outcome.passed]
    if unproved:
        raise SystemExit(f"not proved: {', '.join(unproved)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the stage that is running ends too
    main()
