"""Benchmarks of the system that ships that had no test of their own, at a small size: sensitivity and quantisation."""

import json
from pathlib import Path

import pytest
from commands import run_command

from foley.core.config import PROJECT_ROOT

SHORT = ("steps=4", "num_prompts=2", "duration_seconds=0.5")


@pytest.mark.slow
def test_objectives_are_correlated_with_measured_errors_and_spend_the_budget(tmp_path: Path) -> None:
    small = ("calibration_prompts=1", "num_probes=1", "num_schedules=8", "target_speedups=[1.5]", "resamples=20")
    run_command("bench/sensitivity", *SHORT, *small, f"output_dir={tmp_path}")
    report = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [row["shared"] for row in report["rows"]] == [False, True] * 4
    assert all(row["latent_error"] > 0 for row in report["rows"])
    found = {(row["schedules"], row["objective"]): row for row in report["correlations"]}
    assert len(found) == 9
    for row in found.values():
        assert -1 <= row["spearman"] <= 1
        assert row["n"] == (8 if row["schedules"] == "all" else 4)
    assert [row["policy"] for row in report["policies"]] == [
        "budget by change",
        "budget by change, shared",
        "budget by sensitivity",
        "budget by sensitivity, shared",
        "fewer steps",
    ]


@pytest.mark.slow
def test_clips_in_8_bits_are_held_against_exact_ones(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    prompts, file = PROJECT_ROOT / "data/prompts/demo.jsonl", tmp_path / "quantisation.json"
    run_command(
        "bench/quantisation",
        *SHORT,
        f"prompts={prompts}",
        "~accelerators.audiocache",
        "kinds=[int8_dynamic]",
        f"results_file={file}",
    )
    rows = {(row["quantise"], row["accelerator"]): row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {(kind, name) for kind in ("exact", "int8_dynamic") for name in ("none", "prediction")}
    assert rows["exact", "none"]["error"] == 0
    assert 0 < rows["int8_dynamic", "none"]["error"] < 0.2
    assert rows["int8_dynamic", "none"]["denoiser_mib"] < 0.5 * rows["exact", "none"]["denoiser_mib"]
