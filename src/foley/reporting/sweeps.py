"""The trials of a sweep: their Pareto front, as a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig

from foley.core.files import write_json, write_text
from foley.core.logs import get_logger
from foley.core.reading import read_json, reading
from foley.metrics.latency import RealTimeFactor
from foley.reporting.fewer_steps import FEWER_STEPS
from foley.reporting.plots import save_figure
from foley.reporting.tables import markdown_table

TRIAL_FILE = "trial.json"
Trial = Mapping[str, Any]
"""`number`, `overrides` (its command line), `score` (the name of one), and the values of its objectives."""

_log = get_logger(__name__)


class ParetoReport(Callback):
    """Hydra's callback that reports a sweep once its last job is done, whoever chose the jobs: a grid or a search.

    Args:
        cost: the other objective beside the score; lower is better for both.
    """

    def __init__(self, cost: str) -> None:
        self.cost = cost

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        write_pareto_report(Path(config.hydra.sweep.dir), self.cost)


def read_trials(directory: Path) -> list[Trial]:
    """Those that ended, by number; raises DamagedFileError for a file that is no trial."""
    return sorted(map(_read_trial, directory.glob(f"*/{TRIAL_FILE}")), key=lambda trial: trial["number"])


def _read_trial(file: Path) -> Trial:
    trial = read_json(file, "a trial of a sweep", "remove it, or run the trial again")
    with reading(file, "a trial of a sweep", "remove it, or run the trial again"):
        return {**trial, "number": int(trial["number"]), "overrides": dict(trial["overrides"]), "score": trial["score"]}


def pareto_front(trials: Sequence[Trial], score: str, cost: str) -> list[Trial]:
    """Trials that no other beats in one objective without losing in the other, the cheapest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial[cost], trial[score])):
        if not front or trial[score] < front[-1][score]:
            front.append(trial)
    return front


def is_uncached(trial: Trial) -> bool:
    """Whether every evaluation of it was computed in full: then its speed is that of its steps alone.

    >>> is_uncached({"settings": {"steps": 25}}), is_uncached({"settings": {"steps": 50, "mac_speedup": 2.0}})
    (True, False)
    """
    return bool(trial.get("settings", {}).get("mac_speedup", 1.0) == 1.0)


def write_pareto_report(directory: Path, cost: str) -> None:
    """Write `trials.json`, `pareto.md` and `pareto.png` of the trials below `directory`."""
    trials = read_trials(directory)
    if not trials:
        _log.warning("%s holds no finished trial: no report", directory)
        return
    score = trials[0]["score"]
    front = pareto_front(trials, score, cost)
    write_json(directory / "trials.json", trials)
    write_text(directory / "pareto.md", _table(trials, front, score, cost))
    _plot(trials, front, score, cost, directory / "pareto.png")
    _log.info("%d trials, %d on the front: %s", len(trials), len(front), directory / "pareto.md")


def _table(trials: Sequence[Trial], front: Sequence[Trial], score: str, cost: str) -> str:
    """The front, with those of the settings that differ between trials."""
    everything = dict.fromkeys(name for trial in trials for name in trial["overrides"])
    names = [name for name in everything if len({trial["overrides"].get(name) for trial in trials}) > 1]
    header = ("trial", score, cost, *names, "RTF")
    rows = [
        (
            *(str(t["number"]), f"{t[score]:.4f}", f"{t[cost]:.4f}"),
            *(str(t["overrides"].get(name, "")) for name in names),
            _speed(t),
        )
        for t in front
    ]
    return f"Pareto front of {len(trials)} trials\n\n{markdown_table(header, rows)}\n"


def _speed(trial: Trial) -> str:
    rtf = RealTimeFactor.of_json(trial)
    return "" if rtf is None else rtf.in_words()


def _plot(trials: Sequence[Trial], front: Sequence[Trial], score: str, cost: str, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter([t[cost] for t in trials], [t[score] for t in trials], s=18, color="0.7", label="trials")
    axes.plot([t[cost] for t in front], [t[score] for t in front], "o-", label="Pareto front")
    plain = [trial for trial in trials if is_uncached(trial)]
    if 0 < len(plain) < len(trials):  # what acceleration must beat
        yardstick = pareto_front(plain, score, cost)
        axes.plot([t[cost] for t in yardstick], [t[score] for t in yardstick], "k.--", label=FEWER_STEPS)
    for trial in front:
        axes.annotate(str(trial["number"]), (trial[cost], trial[score]), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel=cost.replace("_", " "), ylabel=score.replace("_", " "))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
