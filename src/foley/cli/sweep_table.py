"""The runs of a sweep (-m) as a table: what each was given, what came of it, and where it lies.

Hydra loads this at the start of every command that can sweep: nothing here imports what takes time.
"""

import math
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

RUN_FILE = "run.json"
TABLE_FILE = "sweep.md"
Run = Mapping[str, Any]
"""`number`, `overrides`, `values` by name, `outcome` (finished, diverged, failed: WHY), `folder`."""


class SweepTable(Callback):
    """Hydra's callback that notes each run of a sweep in its folder, and ends the sweep with a table of them.

    A run that fails does not end a sweep: its traceback is kept in `error.txt` of its folder. After a grid with such
    a run the command fails; a search counts it, as `hydra.sweeper.max_failure_rate` says.

    Args:
        returned: names of what the command returns, in its order; by default that of `optimized_metric`.
        logged: metrics of a training whose last values are shown too; runs are sorted by the first value of all.
    """

    def __init__(self, returned: Sequence[str] = (), logged: Sequence[str] = ()) -> None:
        self.returned, self.logged = list(returned), list(logged)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note the run."""
        if OmegaConf.is_missing(config.hydra.job, "num"):
            return  # no sweep
        from foley.core.files import write_json, write_text

        folder, error = Path(config.hydra.runtime.output_dir), job_return._return_value
        failed = job_return.status == JobStatus.FAILED
        values = {} if failed else self._values(config, folder, error)
        outcome = f"failed: {_in_short(error)}" if failed else "finished" if _all_finite(values) else "diverged"
        overrides = dict(_split(override) for override in job_return.overrides or [])
        run = {"number": config.hydra.job.num, "overrides": overrides, "outcome": outcome, "folder": folder.name}
        write_json(folder / RUN_FILE, {**run, "values": {k: v for k, v in values.items() if math.isfinite(v)}})
        if failed:
            write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
            if config.hydra.sweeper._target_.endswith("BasicSweeper"):
                # A grid would raise the first error after its last run, in the place of a table.
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and show the table; raises SystemExit where a run of a grid failed."""
        from foley.core.files import write_text

        directory = Path(config.hydra.sweep.dir)
        runs = read_runs(directory)
        table = sweep_table(runs)
        write_text(directory / TABLE_FILE, table)
        sys.stdout.write(f"\n{table}\nThe table: {directory / TABLE_FILE}\n")
        failed = [run for run in runs if run["outcome"].startswith("failed")]
        if failed and config.hydra.sweeper._target_.endswith("BasicSweeper"):
            first = directory / failed[0]["folder"] / "error.txt"
            raise SystemExit(f"{len(failed)} of {len(runs)} runs failed; the first: {first}")

    def _values(self, config: DictConfig, folder: Path, returned: Any) -> dict[str, float]:
        """What the run returned and logged, by name."""
        names = self.returned or [config.get("optimized_metric")]
        given = returned if isinstance(returned, tuple) else (returned,)
        values = {str(name): float(value) for name, value in zip(names, given, strict=False) if value is not None}
        if self.logged and (folder / "metrics.csv").is_file():
            from foley.reporting.dashboard import read_metrics

            series = read_metrics(folder / "metrics.csv")
            last = {name: series[name][-1][1] for name in self.logged if name in series}
            values |= {name: value for name, value in last.items() if name not in values}
        return values


def read_runs(directory: Path) -> list[Run]:
    """The runs noted below `directory`: the least first value first, those without one last; else by number."""
    from foley.core.reading import read_json

    runs = [read_json(file, "the note of a run") for file in directory.glob(f"*/{RUN_FILE}")]
    first = next(iter(_names(runs, "values")), "")
    return sorted(runs, key=lambda run: (run["values"].get(first, math.inf), run["number"]))


def sweep_table(runs: Sequence[Run]) -> str:
    """A Markdown table of the runs, with those of the settings that differ between them."""
    from foley.reporting.tables import markdown_table

    settings = [name for name in _names(runs, "overrides") if len({run["overrides"].get(name) for run in runs}) > 1]
    values = _names(runs, "values")
    rows = [
        (
            run["folder"],
            *(run["overrides"].get(name, "") for name in settings),
            *(f"{run['values'][name]:.5g}" if name in run["values"] else "" for name in values),
            run["outcome"],
        )
        for run in runs
    ]
    return markdown_table(("folder", *settings, *values, "outcome"), rows) + "\n"


def _names(runs: Iterable[Run], of: str) -> list[str]:
    return list(dict.fromkeys(name for run in sorted(runs, key=lambda run: run["number"]) for name in run[of]))


def _all_finite(values: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())


def _split(override: str) -> tuple[str, str]:
    name, _, value = override.partition("=")
    return name, value


def _in_short(error: BaseException) -> str:
    """The first line of an error, fit for a cell of a table."""
    words = (str(error).splitlines() or [type(error).__name__])[0].replace("|", "/")
    return words if len(words) <= 100 else f"{words[:97]}..."
