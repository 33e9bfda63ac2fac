"""The denoiser's benchmark at a small size: it runs, and its counts follow closed forms."""

import json
from pathlib import Path

import pytest
from commands import run_command

from foley.core.config import PROJECT_ROOT
from foley.core.devices import described_processor
from foley.reporting.pages import write_page


def test_the_benchmark_reports_steps_training_and_generation(tmp_path: Path) -> None:
    overrides = ["size=tiny", "text=small", "codec=tiny", "num_frames=8", "num_tokens=3", "steps=2"]
    overrides += [
        "repeats=1",
        "matmul_size=64",
        "decode=true",
        "quantisation=true",
        "device=cpu",
        f"results_file={tmp_path}/result.json",
    ]
    run_command("bench/denoiser", *overrides)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["relative_difference_by_hoisting"] < 1e-4
    assert set(result["sampling_step_seconds"]) == {"float32", "bfloat16"}
    assert result["speedup_over_plain_float32"]["float32_plain"] == 1
    training = result["training_step"]
    assert training["float32_checkpointed"]["activation_mib"] < training["float32"]["activation_mib"]
    flops = [entry["model_tflops"] * entry["seconds"] for entry in training.values()]
    assert flops == pytest.approx([flops[0]] * 4)
    generation = result["generation_bfloat16_seconds"]
    assert set(generation) == {"denoise", "decode", "real_time_factor", "machine", "batch_size"}
    assert (generation["machine"], generation["batch_size"]) == (described_processor(), 1)
    assert_quantised(result)
    (tmp_path / "page").mkdir()
    (tmp_path / "result.json").rename(tmp_path / "page/gpu.json")
    write_page(PROJECT_ROOT / "docs/results/templates/denoiser.md", tmp_path / "page.md")
    assert (
        "| sampling step, hoisted | not measured |" in (tmp_path / "page.md").read_text()
    )  # compiled steps alone are its row


def assert_quantised(result: dict) -> None:
    """No row of float8 on a CPU; int8 weights are a quarter of those that are quantised, bfloat16's half of all."""
    rows = result["quantisation"]
    assert set(rows) == {"float32", "bfloat16", "int8_dynamic", "int8_weight"}
    assert rows["float32"]["error"] == 0
    assert all(0 < row["error"] < 0.2 for name, row in rows.items() if name != "float32")
    assert rows["bfloat16"]["weights_mib"] == pytest.approx(rows["float32"]["weights_mib"] / 2, rel=1e-3)
    assert rows["int8_weight"]["weights_mib"] < rows["float32"]["weights_mib"]
    assert all(layer["int8_tflops"] > 0 and 0 <= layer["rounding_share"] < 1 for layer in result["linear_layers"])
