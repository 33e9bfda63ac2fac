"""Mean opinion scores with 95 % intervals: python scripts/analyse_listening_test.py results=FOLDER key=key.json"""

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.files import write_json, write_text
from foley.core.logs import get_logger
from foley.reporting.listening import (
    QUESTIONS,
    Score,
    plot_scores,
    read_ratings,
    score_systems,
    unreliable_listeners,
)
from foley.reporting.scores import markdown_table

log = get_logger(__name__)


def show(score: Score) -> str:
    return f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}]"


@command("script/analyse_listening_test")
def main(cfg: DictConfig) -> None:
    """Write `listening.json`, `.md` and `.png`."""
    files = sorted(Path(cfg.results).glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"results={cfg.results} holds no .csv file: put the listeners' results there")
    ratings = read_ratings(files, Path(cfg.key))
    if unsure := unreliable_listeners(ratings):
        log.warning("%s do not tell the anchors from the recordings: screen=%s", ", ".join(unsure), cfg.screen)
    if cfg.screen:
        ratings = ratings.only([name for name in ratings.listeners if name not in unsure])
    scores = score_systems(ratings, cfg.interval, cfg.seed)
    levels = list(ratings.protocol.scale)
    rows = [(system, *(show(row[name]) for name in QUESTIONS), str(row["mos_q"].n)) for system, row in scores.items()]
    asked = f"protocol {ratings.protocol.name} ({levels[0]} to {levels[-1]})"
    people = f"{len(ratings.listeners)} listeners, {len(ratings.items)} items"
    facts = f"{asked}, {people}, 95 % intervals by {cfg.interval}"
    table = markdown_table(("system", *ratings.protocol.questions.values(), "n"), rows)
    directory = Path(cfg.output_dir)
    write_text(directory / "listening.md", f"{facts}\n\n{table}\n")
    plain = {system: {name: asdict(score) for name, score in row.items()} for system, row in scores.items()}
    setting = {"interval": cfg.interval, "listeners": ratings.listeners, "unreliable": unsure, "screened": cfg.screen}
    scale = {"protocol": ratings.protocol.name, "scale": levels}
    write_json(directory / "listening.json", {**scale, **setting, "scores": plain})
    plot_scores(scores, directory / "listening.png", ratings.protocol)
    log.info("%s\n%s\nwrote %s", facts, table, directory)


if __name__ == "__main__":
    main()
