"""Write the card of a system folder: what it is, what it was trained on, where and for how long, and what was measured.

The facts of its training come from the notes of `make train-demo`, and stay in the folder as `training.json`.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import safe_open

from foley.cli.command import command
from foley.core.components import WEIGHTS_FILE, read_config
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.core.reading import read_json, reading
from foley.reporting.pages import write_page
from foley.system.system import STUDENT_FOLDER

TRAINING_FILE, ATTRIBUTION_FILE = "training.json", "ATTRIBUTION.md"
Facts = dict[str, Any]


def count_parameters(weights: Path) -> int:
    """Elements of all tensors in a safetensors file."""
    with safe_open(weights, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118  (no mapping)


def describe_part(folder: Path, name: str) -> Facts:
    """A component's parameters, and its class and size in words."""
    config = read_config(folder)
    sizes = ("width", "depth", "dim", "latent_channels", "sample_rate_hz")
    what = ", ".join(f"{size.replace('_', ' ')} {config[size]}" for size in sizes if size in config)
    kind = config["_target_"].rpartition(".")[2]
    return {"name": name, "parameters": count_parameters(folder / WEIGHTS_FILE), "what": f"{kind}; {what}"}


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


def read_licences(attribution: Path) -> dict[str, int]:
    """Clips of each licence, out of the table that scripts/write_attributions.py writes; empty without it."""
    if not attribution.is_file():
        return {}
    rows = re.findall(r"^\| .* \| ([^|]+) \| (\d+) \|$", attribution.read_text(encoding="utf-8"), re.MULTILINE)
    counts: Counter[str] = Counter()
    for licence, clips in rows:
        counts[licence] += int(clips)
    return dict(counts.most_common())


def describe(system: Path) -> Facts:
    """All that the card says of the folder itself."""
    parts = sorted(file.parent for file in system.rglob(WEIGHTS_FILE))
    training = system / TRAINING_FILE
    stages = []
    if training.is_file():
        content = read_json(training, "the stages of a training run", "write it again with training=")
        with reading(training, "the stages of a training run", "write it again with training="):
            stages = content["stages"]
    return {
        "parts": [describe_part(folder, str(folder.relative_to(system))) for folder in parts],
        "megabytes": sum(file.stat().st_size for file in system.rglob("*") if file.is_file()) / 1e6,
        "calibrations": sorted(file.stem for file in system.glob("calibration/*.json")),
        "has_student": (system / STUDENT_FOLDER).is_dir(),
        "licences": read_licences(system / ATTRIBUTION_FILE),
        "stages": stages,
        "hours": sum(stage["seconds"] for stage in stages) / 3600,
    }


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
