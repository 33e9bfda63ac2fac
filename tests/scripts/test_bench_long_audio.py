"""scripts/bench/long_audio.py at a small size: every way generates, apart as well."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import compose_command, load_command
from omegaconf import OmegaConf

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
    return load_command("bench/long_audio")


def _config(folder: Path, *overrides: str) -> Any:
    places = (f"results_file={folder}/long.json", "device=cpu")
    return compose_command("bench/long_audio", *SMALL, *WINDOWS, *places, *overrides)


@pytest.mark.parametrize("way", ["plain", "windowed", "local_global"])
def test_every_way_reports_peaks_and_seconds(way: str, bench: dict[str, Any], tmp_path: Path) -> None:
    settings: Any = OmegaConf.to_container(_config(tmp_path), resolve=True)
    row = bench["measure"]({**settings, "duration_seconds": 1.0, "way": {"name": way, **settings["ways"][way]}})
    assert (row["way"], row["duration_seconds"]) == (way, 1.0)
    assert 0 < row["parts_gigabytes"] <= row["denoise_gigabytes"] <= row["peak_gigabytes"]
    assert min(row["denoise_seconds"], row["decode_seconds"], row["tmacs"]) > 0
    assert row["real_time_factor"] == pytest.approx(row["denoise_seconds"] + row["decode_seconds"])  # of 1 s


@pytest.mark.slow
def test_each_case_has_a_process_of_its_own(bench: dict[str, Any], tmp_path: Path) -> None:
    bench["main"](_config(tmp_path, "durations_seconds=[0.5]", "~ways.local_global"))
    result = json.loads((tmp_path / "long.json").read_text())
    assert [(row["way"], row["duration_seconds"]) for row in result["rows"]] == [("plain", 0.5), ("windowed", 0.5)]
    assert {"commit", "processor"} <= result["provenance"].keys()
    assert result["settings"]["model"]["width"] == 16
