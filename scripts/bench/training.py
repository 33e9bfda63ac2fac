"""Training runs beside each other, over their steps: validation loss, label accuracy and Frechet distance.

Each run keeps all its checkpoints (callbacks.checkpoint.keep_all=true). Runs that differ in their seed alone have one
name; their means and standard deviations are the summary.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.generation.prompts import LabelledPrompts
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.reporting.dashboard import read_metrics
from foley.reporting.tables import provenance

Row = dict[str, Any]
SCORES = ("val_loss", "frechet_distance", "label_accuracy")


def score_checkpoint(path: Path, judge: Judge, cfg: DictConfig) -> Row:
    """Scores of what the checkpoint generates; the same prompts and seeds for each."""
    prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
    result = TextToAudio.load(path, resolve_device(cfg.device)).generate(
        prompts.captions, cfg.duration_seconds, num_steps=cfg.steps, batch_size=cfg.batch_size
    )
    return {**judge.score(result.audio, result.sample_rate_hz, prompts.labels), **result.rtf.to_json()}


def measure_run(name: str, folder: Path, first_step: int, judge: Judge, cfg: DictConfig) -> list[Row]:
    """A row for each checkpoint; steps count from `first_step`, those of an earlier stage."""
    paths = sorted(folder.glob("checkpoints/step_*.ckpt"))
    if not paths:
        raise FileNotFoundError(f"runs.{name}: {folder} holds no checkpoints/step_*.ckpt")
    losses = dict(read_metrics(folder / "metrics.csv").get("val/loss", []))
    rows = []
    for path in paths:
        step = int(path.stem.removeprefix("step_"))
        loss = losses.get(step - 1)  # Lightning counts from zero
        scores = score_checkpoint(path, judge, cfg)
        rows.append({"run": name, "folder": folder.name, "step": first_step + step, "val_loss": loss, **scores})
    return rows


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation of each score over the runs of one name, at each step."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["run"], row["step"]].append(row)
    summary = []
    for (run, step), members in sorted(groups.items()):
        facts: Row = {"run": run, "step": step, "n": len(members)}
        for score in SCORES:
            values = [row[score] for row in members if row[score] is not None]
            facts[score] = mean(values) if values else None
            facts[f"{score}_std"] = stdev(values) if len(values) > 1 else None
        summary.append(facts)
    return summary


@command("bench/training")
def main(cfg: DictConfig) -> None:
    judge = Judge.load(Path(cfg.extractor_dir), cfg.reference)
    rows = []
    for name, run in cfg.runs.items():
        folders = sorted(path for path in Path(run.parent).glob(run.folders) if path.is_dir())
        if not folders:
            raise FileNotFoundError(f"runs.{name}: no folder {run.folders} in {run.parent}")
        for folder in folders:
            rows += measure_run(name, folder, run.get("first_step", 0), judge, cfg)
    summary = summarise(rows)
    write_json(Path(cfg.output_dir) / "training.json", {"summary": summary, "rows": rows, "provenance": provenance()})
    sys.stdout.write("\n".join(json.dumps(row) for row in summary) + "\n")


if __name__ == "__main__":
    main()
