"""The benchmark of metrics, small: rows of bias, and a page from whatever has been measured."""

import json
import shutil
from pathlib import Path

from commands import run_command

from foley.core.config import PROJECT_ROOT


def test_bias_is_measured_and_the_page_written(tmp_path: Path) -> None:
    shutil.copytree(PROJECT_ROOT / "docs" / "results" / "templates", tmp_path / "templates")
    small = ["parts=[bias]", "bias.sizes=[8,16]", "bias.repeats=2", "bias.gaussian_features=4", "bias.clip_seconds=0.5"]
    run_command("bench/metrics", *small, f"page={tmp_path / 'metrics.md'}")
    rows = json.loads((tmp_path / "metrics" / "bias.json").read_text())["rows"]
    assert [(row["distribution"], row["n"]) for row in rows] == [
        (name, n) for name in ("Gaussian", "procedural clips") for n in (8, 16)
    ]
    assert all(row["frechet_distance"] > 0 for row in rows)
    assert (tmp_path / "metrics" / "bias.png").is_file()
    page = (tmp_path / "metrics.md").read_text()
    assert "| Gaussian | 4 | 8 |" in page
    assert "Not measured yet." in page
