"""scripts/bench/long_audio.py at a small size: every way generates, apart as well."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foley.core.config import PROJECT_ROOT

SMALL = (
    "model.width=16",
    "model.num_heads=2",
    "model.depth=2",
    "codec.channels=4",
    "codec.num_units=[1,1,1,1]",
    "steps=1",
)
WINDOWS = ("ways.windowed.window_seconds=0.4", "ways.windowed.decode_chunk_seconds=0.2", "overlap_seconds=0.1")


@pytest.fixture
def bench() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT_ROOT / "scripts" / "bench" / "long_audio.py"))


def _config(folder: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        places = (f"results_file={folder}/long.json", "device=cpu")
        return compose("bench/long_audio", overrides=[*SMALL, *WINDOWS, *places, *overrides])


@pytest.mark.parametrize("way", ["plain", "windowed", "local_global"])
def test_every_way_reports_peaks_and_seconds(way: str, bench: dict[str, Any], tmp_path: Path) -> None:
    settings: Any = OmegaConf.to_container(_config(tmp_path), resolve=True)
    row = bench["measure"]({**settings, "duration_seconds": 1.0, "way": {"name": way, **settings["ways"][way]}})
    assert (row["way"], row["duration_seconds"]) == (way, 1.0)
    assert 0 < row["parts_gigabytes"] <= row["denoise_gigabytes"] <= row["peak_gigabytes"]
    assert min(row["denoise_seconds"], row["decode_seconds"]) > 0


@pytest.mark.slow
def test_each_case_has_a_process_of_its_own(bench: dict[str, Any], tmp_path: Path) -> None:
    bench["main"](_config(tmp_path, "durations_seconds=[0.5]", "~ways.local_global"))
    result = json.loads((tmp_path / "long.json").read_text())
    assert [(row["way"], row["duration_seconds"]) for row in result["rows"]] == [("plain", 0.5), ("windowed", 0.5)]
    assert {"commit", "processor"} <= result["provenance"].keys()
    assert result["settings"]["model"]["width"] == 16
