"""The benchmark of the server under load: its arithmetic, and a whole run in small."""

import json
from pathlib import Path

import pytest
import torch
from commands import compose_command, load_command, run_command


@pytest.fixture(scope="module")
def bench():
    return load_command("bench/serving")


def answers(bench, *facts):
    """Answers of a status, seconds, and how long the client would wait."""
    return [
        bench["Answer"](bench["Ask"]("rain", seed, 2.0, patience), status, seconds)
        for seed, (status, seconds, patience) in enumerate(facts)
    ]


def test_latency_is_of_sounds_and_who_waits_for_nothing_is_lost(bench) -> None:
    came = answers(bench, *((200, float(seconds), None) for seconds in range(1, 101)))
    gone, lost = answers(bench, (0, 0.1, 0.1)), answers(bench, (0, 300.0, None), (429, 0.01, None))
    row = bench["described"]([*came, *gone, *lost])
    assert (row["n"], row["lost"], row["max_seconds"]) == (103, 2, 100.0)
    assert (row["p50_seconds"], row["p95_seconds"]) == pytest.approx((50.5, 95.05))
    nothing = bench["described"](lost)
    assert (nothing["lost"], nothing["p50_seconds"], nothing["max_seconds"]) == (2, None, None)


def test_rates_are_of_the_sounds_that_came(bench) -> None:
    plain = bench["rated"](answers(bench, *[(200, 1.0, None)] * 4), seconds=8.0, processor=8.0)
    served = bench["rated"](answers(bench, (0, 0.1, 0.1), *[(200, 1.0, None)] * 4), seconds=4.0, processor=6.0)
    first, second = bench["against"](plain, [served])
    assert (first["clips_per_second"], first["throughput_ratio"], first["processor_ratio"]) == (0.5, 1.0, 1.0)
    assert second["throughput_ratio"] == pytest.approx(2.0)
    assert second["processor_ratio"] == pytest.approx(8 / 6)


def test_counters_are_taken_over_the_load_alone(bench) -> None:
    before = {'foley_jobs_total{outcome="done"}': 16.0, "foley_batch_clips_sum": 16.0, "foley_batch_clips_count": 4.0}
    after = {
        **{'foley_jobs_total{outcome="done"}': 34.0, "foley_batch_clips_sum": 36.0, "foley_batch_clips_count": 7.0},
        'foley_jobs_total{outcome="cancelled"}': 2.0,
    }
    counted = bench["gained"](after, before)
    assert bench["outcomes"](counted) == {"done": 18, "cancelled": 2}
    assert bench["mean_batch"](counted, []) == pytest.approx(20 / 3)
    said = [bench["Answer"](bench["Ask"]("rain", 0, 2.0), 200, 1.0, b"", batch) for batch in [8] * 16 + [4] * 4]
    assert bench["mean_batch"]({}, said) == pytest.approx(20 / 3)  # two batches of 8 and one of 4
    assert bench["mean_batch"]({}, []) is None


def test_the_mixed_load_is_drawn_from_its_seed(bench) -> None:
    cfg = compose_command("bench/serving", "mixed.requests=500")
    asks = bench["mixed_load"](cfg, ["rain", "wind"])
    assert asks == bench["mixed_load"](cfg, ["rain", "wind"])
    assert {ask.duration_seconds for ask in asks} == {1.0, 1.5, 2.0}
    gone = [ask.patience_seconds for ask in asks if ask.patience_seconds is not None]
    assert 25 <= len(gone) <= 75  # five standard deviations from 10 %
    assert 0 <= min(gone) <= max(gone) <= 1.0
    assert [ask.prompt for ask in asks[:3]] == ["rain", "wind", "rain"]


@pytest.mark.slow
def test_a_run_in_small_loses_no_request_and_its_sounds_are_those_of_generate(tmp_path: Path) -> None:
    small = ["requests=16", "clients=4", "warmup=4", "rounds=1", "memory_after=[4,16]", "compared=4", "litserve=false"]
    others = ["~servers.one_by_one", "~servers.worker_per_core", "~servers.spinning"]
    load = ["mixed.requests=16", "mixed.share_gone=0.3", "mixed.most_patience_seconds=0.2"]
    threads = f"num_threads={torch.get_num_threads()}"  # as they are: the setting outlives the test
    run_command("bench/serving", *small, *others, *load, threads, f"output_dir={tmp_path}", f"work_dir={tmp_path}")
    found = json.loads((tmp_path / "serving.json").read_text())
    loop, served = found["rows"]
    assert (loop["way"], served["way"]) == ("loop", "batched")
    assert (loop["n"], served["n"], served["lost"], served["outcomes"]) == (16, 16, 0, {"done": 16})
    assert served["largest_difference"] < 1e-3
    assert 1 <= served["mean_batch"] <= 4
    assert set(served["memory_megabytes"]) == {"4", "16"}
    (mixed,) = found["mixed"]
    assert (mixed["n"], mixed["lost"], mixed["waiting"], mixed["running"]) == (16, 0, 0, 0)
    assert mixed["gone"] > 0
    assert mixed["adds_up"] == "yes"
