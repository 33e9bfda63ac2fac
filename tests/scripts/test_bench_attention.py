"""scripts/bench/attention.py at small sizes: what it reports, and that its ways to compute the same agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compose_command, run_command
from hydra.utils import instantiate
from torch import nn

from foley.accel.diffusers.audioldm2 import find_self_attention
from foley.core.devices import described_processor

SMALL_UNET = (
    "unet.in_channels=4",
    "unet.out_channels=4",
    "unet.block_out_channels=[8,16,16,16]",
    "unet.attention_head_dim=2",
    "unet.cross_attention_dim=[[null,6,10],[null,6,10],[null,6,10],[null,6,10]]",
    "+unet.norm_num_groups=4",
    "+unet.layers_per_block=1",
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file: Path = tmp_path_factory.mktemp("bench") / "attention.json"
    sizes = (
        "attention.num_tokens=[64,128]",
        "window.num_tokens=[300]",
        "step.durations_seconds=[1]",
        "rounds=1",
        "step.rounds=1",
        "device=cpu",
    )
    run_command("bench/attention", *SMALL_UNET, *sizes, f"results_file={file}")
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.slow
def test_every_variant_is_timed_against_dense(result: dict[str, Any]) -> None:
    assert [row["num_tokens"] for row in result["attention"]] == [64, 128]
    assert [row["num_tokens"] for row in result["window"]] == [300]
    assert result["window"][0]["local_global"]["seconds"] > 0
    assert [row["duration_seconds"] for row in result["denoising_step"]] == [1]
    for row, variant in ((result["attention"][0], "straight_reading"), (result["denoising_step"][0], "token_merging")):
        assert row["dense"]["speedup"] == 1
        assert row["litefocus"]["speedup"] == row["dense"]["seconds"] / row["litefocus"]["seconds"]
        assert row[variant]["seconds"] > 0
    assert {"commit", "processor", "torch"} <= result["provenance"].keys()
    assert result["settings"]["accelerators"]["litefocus"]["ratio"] == result["settings"]["attention"]["ratio"] == 0.1


def test_the_products_are_those_of_the_closed_form(result: dict[str, Any]) -> None:
    attention = result["settings"]["attention"]
    for row in result["attention"]:
        tokens, width = row["num_tokens"], attention["num_heads"] * attention["head_dim"]
        assert row["dense"]["tmacs"] == pytest.approx(2 * tokens**2 * width / 1e12)
        same_frequency, shared = tokens // attention["num_frequencies"], round(attention["ratio"] * tokens)
        keys = row["litefocus_double_count"]["tmacs"] * 1e12 / (2 * tokens * width)
        assert keys == pytest.approx(same_frequency + shared, abs=1)
    (step,) = result["denoising_step"]
    assert step["litefocus"]["tmacs"] < step["dense"]["tmacs"]
    assert step["dense"]["real_time_factor"] == pytest.approx(step["dense"]["seconds"] / 1)
    assert (step["dense"]["machine"], step["dense"]["batch_size"]) == (described_processor(), 1)


def test_each_way_to_compute_the_same_gives_the_same(result: dict[str, Any]) -> None:
    for row in result["attention"]:
        assert len(row["largest_difference"]) == 2
        assert max(row["largest_difference"].values()) < 1e-5


def test_the_published_unet_has_the_heads_of_the_attention_benchmark() -> None:
    cfg = compose_command("bench/attention")
    with torch.device("meta"):
        unet: nn.Module = instantiate(cfg.unet)
    layers = find_self_attention(unet, cfg.accelerators.litefocus.blocks)
    assert len(layers) == 2 * 4 + 3 * 4
    for layer in layers:
        assert layer.attention.heads == cfg.attention.num_heads
        assert layer.attention.to_q.out_features == cfg.attention.num_heads * cfg.attention.head_dim
