"""Curves out of a training run's `metrics.csv`."""

import csv
from pathlib import Path

Curve = tuple[list[int], list[float]]


def read_curve(metrics_file: Path, name: str) -> Curve:
    """Optimizer steps and values of one metric; empty lists where it was never logged."""
    with metrics_file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]
