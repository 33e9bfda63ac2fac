"""The benchmark of our caches against diffusers' own runs every one of them, at a small size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compose_command, load_command
from diffusers import FirstBlockCacheConfig
from stirring_parts import stir

from foley.accel.diffusers.as_transformer import AsTransformer
from foley.core.config import PROJECT_ROOT
from foley.core.devices import described_processor
from foley.core.hashing import hash_module
from foley.models.dit.llama import LlamaTransformer
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola

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
    "theirs.MagCache.threshold=[0.5]",
    "theirs.SeaCache.threshold=[0.5]",
    "cache_dit.DBCache.thresholds=[0.9]",
    "cache_dit.DBCache.config.max_warmup_steps=2",
    "~ours.PredictionReuse",
    "ours.AudioCache.threshold=[0.2]",
    "ours.SmoothCache.alpha=[0.1]",
    "ours.Budget.target_speedup=[1.5]",
    *(f"ours.{cache}.threshold=[0.2]" for cache in ("TeaCache", "FirstBlockCache", "DBCache", "MagCache")),
    "fewer_steps=[6,4,3]",
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
    assert {row["cache"] for row in rows} == {*cfg.ours, *cfg.theirs, *cfg.cache_dit, "fewer steps"}
    assert all(row["wall_speedup"] > 0 for row in rows)
    uncached = result["settings"]["tmacs_uncached"]
    of_theirs = result["settings"]["as_theirs_see_it"]["tmacs"]
    assert of_theirs == pytest.approx(uncached)  # the same model, called in the same way
    assert all(row["tmacs"] * row["mac_speedup"] == pytest.approx(uncached) for row in rows)
    assert all(row["real_time_factor"] == pytest.approx(row["seconds"] * 44100 / (16 * 2048)) for row in rows)
    assert {(row["machine"], row["batch_size"]) for row in rows} == {(described_processor(), 1)}
    for cache in ("PyramidAttentionBroadcast", "FasterCache", "TaylorSeerCache"):  # theirs are counted as they run
        assert min(row["tmacs"] for row in rows if row["cache"] == cache) < uncached
    fora = [row for row in rows if row["cache"] == "Fora" and row["reuse"] == "hold"]
    assert all(row["latent_error"] > 0 and row["mac_speedup"] > 1 for row in fora)
    for cache in ("PyramidAttentionBroadcast", "FasterCache", "TaylorSeerCache"):
        assert max(row["latent_error"] for row in rows if row["cache"] == cache) > 0
    assert [pair["theirs"] for pair in result["matched"]] == [
        row for row in rows if row["of"] in ("diffusers", "cache-dit")
    ]
    marked = [row for row in rows if "beats_fewer_steps" in row]
    assert marked == [row for row in rows if row["of"] != "fewer steps"]
    assert "commit" in result["provenance"]
    assert result["settings"]["weights"].startswith("random")
    assert (tmp_path / "diffusers_caching.png").stat().st_size > 0


@pytest.mark.slow
def test_a_trained_system_is_measured_with_every_cache(tmp_path: Path) -> None:
    narrow = [option for option in TINY if option.startswith(("theirs.", "cache_dit.", "~ours", "ours.", "repeats"))]
    few = (
        "steps=8",
        "fewer_steps=[6,5,4]",
        "ours.Fora.interval=[2]",
        "ours.AudioCache.threshold=[0.2]",
        "reuse=[hold]",
    )
    small = (f"system={PROJECT_ROOT}/data/demo", "num_prompts=1", "duration_seconds=0.5", "device=cpu")
    cfg = compose_command("bench/diffusers_caching", *narrow, *few, *small, f"output_dir={tmp_path}")
    load_command("bench/diffusers_caching")["main"](cfg)
    result = json.loads((tmp_path / "diffusers_caching.json").read_text())
    assert {row["cache"] for row in result["rows"]} == {*cfg.ours, *cfg.theirs, *cfg.cache_dit, "fewer steps"}
    assert result["settings"]["as_theirs_see_it"]["latent_error"] < 1e-4  # the same weights and numbers
    assert result["settings"]["weights"].endswith("data/demo")
    by_cache = {(row["of"], row["cache"]): row for row in result["rows"]}
    skipping = (("diffusers", name) for name in ("MagCache", "SeaCache", "TaylorSeerCache"))
    for of, cache in (*skipping, ("cache-dit", "DBCache")):
        assert by_cache[of, cache]["mac_speedup"] > 1


@pytest.mark.parametrize("denoiser", [DiffusionTransformer, LlamaTransformer])
def test_a_denoiser_of_ours_is_the_same_as_a_transformer_of_diffusers(denoiser: Any) -> None:
    torch.manual_seed(0)
    scheme = {"modulation": AdaLNSola(rank=2, alpha=2)} if denoiser is DiffusionTransformer else {}
    model = denoiser(latent_channels=4, width=16, depth=4, num_heads=2, context_dim=8, **scheme).eval()
    stir(model)
    transformer, digest = AsTransformer(model), hash_module(model)
    noisy, timestep, text = torch.randn(2, 4, 20), torch.tensor([500, 500]), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with torch.no_grad():
        expected = model(noisy, timestep, text, mask)
        assert torch.equal(transformer(noisy, timestep, text, mask).sample, expected)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        with transformer.cache_context("joint"):
            computed, reused = (transformer(noisy, timestep, text, mask, return_dict=False)[0] for _ in range(2))
        assert torch.equal(computed, expected)
        torch.testing.assert_close(reused, expected, rtol=1e-5, atol=1e-5)
    assert hash_module(model) == digest
