"""scripts/bench/backends.py at a small size: what it reports of each way to run a step."""

import json
from pathlib import Path

import pytest
from commands import run_command

SMALL = ("num_frames=20", "rounds=1", "steps=2")
TWO_LAYERS = [f"denoisers.width_512.{name}" for name in ("width=32", "depth=2", "num_heads=2")]


def test_a_step_is_timed_and_compared(tmp_path: Path) -> None:
    file = tmp_path / "backends.json"
    run_command("bench/backends", *SMALL, "~denoisers.width_512", "ways=[eager]", f"results_file={file}")
    report = json.loads(file.read_text())
    (row,) = report["guided_step"]["demo"].values()
    assert row["seconds"] > 0
    assert (row["speedup"], row["largest_difference"]) == (1, 0)
    assert {"commit", "processor", "torch"} <= report["provenance"].keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles and exports
def test_every_way_computes_the_same_step(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "backends.json"
    run_command(
        "bench/backends", *SMALL, *TWO_LAYERS, "demo=false", "ways=[eager,compiled,onnx]", f"results_file={file}"
    )
    rows = json.loads(file.read_text())["guided_step"]["width_512"]
    assert list(rows) == ["eager", "compiled", "onnx"]
    assert max(row["largest_difference"] for row in rows.values()) < 1e-4
