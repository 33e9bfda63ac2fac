"""scripts/bench/decode.py at small sizes: what it reports, and that all ways to decode agree."""

import json

import pytest
import torch
from commands import run_command

SMALL = ["codecs.published.channels=8", "codecs.published.num_units=[1,1,1,1]", "codecs.tiny.channels=4"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "decode.json"
    overrides = ["duration_seconds=0.6", "decode_chunk_seconds=0.2", "rounds=1", f"num_threads={threads()}"]
    run_command("bench/decode", *SMALL, *overrides, f"results_file={file}")
    return json.loads(file.read_text())


def threads() -> int:
    return torch.get_num_threads()  # as they are: the setting outlives the test


@pytest.mark.parametrize("codec", ["published", "tiny"])
def test_every_way_is_timed_and_gives_the_same_audio(result, codec):
    report = result["codecs"][codec]
    assert (report["num_frames"], report["chunk_frames"]) == (30, 10)
    assert report["output_std"] > 0.01
    for name, row in report["decoders"].items():
        assert row["speedup"] == pytest.approx(report["decoders"]["unfolded_float32"]["seconds"] / row["seconds"])
        assert row["real_time_factor"] == pytest.approx(row["seconds"] / 0.6)
        assert row["tmacs"] > 0
        assert row["largest_difference"] < (0.1 if "bfloat16" in name else 1e-4)
    assert len(report["stages"]) == 4
    assert report["stages"][-1]["length"] == 30 * 480
    assert {"commit", "processor", "torch"} <= result["provenance"].keys()
