"""Write the card of a system folder: what it is, what it was trained on, where and for how long, and what was measured.

The facts of its training come from the notes of `make train-demo`, and stay in the folder as `training.json`.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.core.reading import read_json, reading
from foley.reporting.pages import write_page
from foley.system.sharing import TRAINING_FILE, describe

Facts = dict[str, Any]


def read_stages(notes: Path) -> list[Facts]:
    """The stages of training in the order in which they ran: by the age of their notes."""
    files = sorted(notes.glob("*.json"), key=lambda file: file.stat().st_mtime)
    stages = []
    for file in files:
        note = read_json(file, "notes of a training run", "remove it")
        with reading(file, "notes of a training run", "remove it"):
            origin = note["provenance"]
            stage = {"name": file.stem, "command": note["command"], "seconds": note["seconds"]}
            stages.append({**stage, "machine": origin.get("gpu", origin["processor"])})
    return stages


@command("script/write_card")
def main(cfg: DictConfig) -> None:
    """Write `training.json` where notes are given, and the card."""
    system = Path(cfg.system)
    if cfg.training is not None:
        write_json(system / TRAINING_FILE, {"stages": read_stages(Path(cfg.training))})
    write_page(Path(cfg.template), Path(cfg.output), Path(cfg.results_dir), card=describe(system))
    get_logger(__name__).info("wrote %s", cfg.output)


if __name__ == "__main__":
    main()
