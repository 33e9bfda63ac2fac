"""The denoiser's benchmark at a small size: it runs, and its counts follow closed forms."""

import json
from pathlib import Path

import pytest
from commands import run_command

from foley.core.config import PROJECT_ROOT
from foley.reporting.pages import write_page


def test_the_benchmark_reports_steps_training_and_generation(tmp_path: Path) -> None:
    overrides = ["size=tiny", "text=small", "codec=tiny", "num_frames=8", "num_tokens=3", "steps=2"]
    overrides += ["repeats=1", "matmul_size=64", "decode=true", "device=cpu", f"results_file={tmp_path}/result.json"]
    run_command("bench/denoiser", *overrides)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["relative_difference_by_hoisting"] < 1e-4
    assert set(result["sampling_step_seconds"]) == {"float32", "bfloat16"}
    assert result["speedup_over_plain_float32"]["float32_plain"] == 1
    training = result["training_step"]
    assert training["float32_checkpointed"]["activation_mib"] < training["float32"]["activation_mib"]
    flops = [entry["model_tflops"] * entry["seconds"] for entry in training.values()]
    assert flops == pytest.approx([flops[0]] * 4)
    assert set(result["generation_bfloat16_seconds"]) == {"denoise", "decode", "real_time_factor"}
    (tmp_path / "page").mkdir()
    (tmp_path / "result.json").rename(tmp_path / "page/gpu.json")
    write_page(PROJECT_ROOT / "docs/results/templates/denoiser.md", tmp_path / "page.md")
    assert "| sampling step, hoisted | not measured |" in (tmp_path / "page.md").read_text()  # compiled steps alone are its row
