"""The benchmark of our caches against diffusers' own runs every one of them, at a small size."""

import json
import runpy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from foley.config import PROJECT_ROOT

SIZES = {"num_layers": 3, "num_attention_heads": 2, "num_key_value_attention_heads": 1, "sample_size": 16}
MORE_SIZES = {
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 8,
    "cross_attention_input_dim": 8,
    "global_states_input_dim": 16,
    "time_proj_dim": 8,
}
TINY = (
    *(f"model.{name}={value}" for name, value in SIZES.items()),
    *(f"+model.{name}={value}" for name, value in MORE_SIZES.items()),
    "text_tokens=3",
    "steps=8",
    "repeats=1",
    "device=cpu",
)


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
def test_every_cache_is_measured_and_matched(tmp_path: Path) -> None:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg = compose("bench_diffusers_caching", overrides=[*TINY, f"output_dir={tmp_path}"])
    runpy.run_path(str(PROJECT_ROOT / "scripts" / "bench_diffusers_caching.py"))["main"](cfg)
    result = json.loads((tmp_path / "diffusers_caching.json").read_text())
    rows = result["rows"]
    assert {row["cache"] for row in rows} == {*cfg.ours, *cfg.theirs}
    assert all(row["wall_speedup"] > 0 for row in rows)
    fora = [row for row in rows if row["cache"] == "Fora" and row["reuse"] == "hold"]
    assert all(row["latent_error"] > 0 and row["mac_speedup"] > 1 for row in fora)
    for cache in ("PyramidAttentionBroadcast", "FasterCache", "TaylorSeerCache"):
        assert max(row["latent_error"] for row in rows if row["cache"] == cache) > 0
    for pair in result["matched"]:
        assert pair["ours"] is None or pair["ours"]["latent_error"] <= pair["theirs"]["latent_error"]
    assert result["settings"]["weights"].startswith("random")
    assert (tmp_path / "diffusers_caching.png").stat().st_size > 0
