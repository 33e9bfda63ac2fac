"""The benchmark of our caches against diffusers' own runs every one of them, at a small size."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import compose_command, load_command

from foley.core.devices import described_processor

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
    "theirs.FirstBlockCache.threshold=[0.1]",
    "theirs.PyramidAttentionBroadcast.spatial_attention_block_skip_range=[3]",
    "theirs.FasterCache.spatial_attention_block_skip_range=[3]",
    "theirs.TaylorSeerCache.cache_interval=[3]",
    "text_tokens=3",
    "steps=8",
    "repeats=1",
    "device=cpu",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
def test_every_cache_is_measured_and_matched(tmp_path: Path) -> None:
    cfg = compose_command("bench/diffusers_caching", *TINY, f"output_dir={tmp_path}")
    load_command("bench/diffusers_caching")["main"](cfg)
    result = json.loads((tmp_path / "diffusers_caching.json").read_text())
    rows = result["rows"]
    assert {row["cache"] for row in rows} == {*cfg.ours, *cfg.theirs}
    assert all(row["wall_speedup"] > 0 for row in rows)
    uncached = result["settings"]["tmacs_uncached"]
    assert all(row["tmacs"] * row["mac_speedup"] == pytest.approx(uncached) for row in rows)
    assert all(row["real_time_factor"] == pytest.approx(row["seconds"] * 44100 / (16 * 2048)) for row in rows)
    assert {(row["machine"], row["batch_size"]) for row in rows} == {(described_processor(), 1)}
    for cache in ("PyramidAttentionBroadcast", "FasterCache", "TaylorSeerCache"):  # theirs are counted as they run
        assert min(row["tmacs"] for row in rows if row["cache"] == cache) < uncached
    fora = [row for row in rows if row["cache"] == "Fora" and row["reuse"] == "hold"]
    assert all(row["latent_error"] > 0 and row["mac_speedup"] > 1 for row in fora)
    for cache in ("PyramidAttentionBroadcast", "FasterCache", "TaylorSeerCache"):
        assert max(row["latent_error"] for row in rows if row["cache"] == cache) > 0
    assert [pair["theirs"] for pair in result["matched"]] == [row for row in rows if row["of"] == "diffusers"]
    assert "commit" in result["provenance"]
    assert result["settings"]["weights"].startswith("random")
    assert (tmp_path / "diffusers_caching.png").stat().st_size > 0


def test_speedups_are_compared_at_the_same_error() -> None:
    bench = load_command("bench/diffusers_caching")

    def rows(of: str, cache: str, *points: tuple[float, float]) -> list[dict[str, Any]]:
        common = {"of": of, "cache": cache, "reuse": "hold"}
        return [{**common, "latent_error": error, "wall_speedup": speedup} for error, speedup in points]

    slow, fast = rows("foley", "slow", (0.1, 2.0), (0.3, 4.0)), rows("foley", "fast", (0.1, 3.0), (0.15, 2.0))
    speedups = [bench["speedup_at"](error, slow) for error in (0.0, 0.05, 0.2, 0.3, 0.4)]
    assert speedups == [1.0, 1.5, pytest.approx(3.0), 4.0, None]
    theirs = rows("diffusers", "theirs", (0.15, 1.5), (0.25, 7.0), (0.5, 8.0))
    near, far, beyond = bench["match"]([*slow, *fast, *theirs])
    assert (near["ours"]["cache"], near["ours"]["wall_speedup"], near["ours_over_theirs"]) == ("fast", 3.0, 2.0)
    assert (far["ours"]["cache"], far["ours_over_theirs"]) == ("slow", pytest.approx(0.5))
    assert (beyond["ours"], beyond["ours_over_theirs"]) == (None, None)
