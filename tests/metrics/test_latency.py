"""Latency: how often the callable runs, and the arithmetic."""

import pytest
import torch

from foley.core.devices import described_processor
from foley.metrics.latency import Latency, RealTimeFactor, Rounds, measure_latency, measure_rounds, real_time_factor


def test_warm_up_calls_are_made_and_not_timed() -> None:
    calls: list[int] = []
    measured = measure_latency(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5
    assert measured.repeats == 3
    assert 0 <= measured.minimum_seconds <= measured.median_seconds <= measured.maximum_seconds


def test_real_time_factor() -> None:
    assert Latency(2.0, 1.0, 3.0, repeats=5).real_time_factor(audio_seconds=10.0) == 0.2
    assert real_time_factor(computing_seconds=30.0, audio_seconds=10.0) == 3.0


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        measure_latency(lambda: None, repeats=0)


def test_rivals_are_timed_in_turns() -> None:
    calls: list[str] = []

    def call(name: str) -> str:
        calls.append(name)
        return f"{name}{len(calls)}"

    measured = measure_rounds({name: lambda name=name: call(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert measured.results == {"a": "a5", "b": "b6"}
    assert len(measured.seconds["a"]) == len(measured.processor_seconds["b"]) == 2


def test_a_speedup_is_the_median_over_rounds_of_the_ratio_within_each() -> None:
    processor_seconds = {"slow": [2.0, 4.0, 3.0], "fast": [1.0, 2.0, 1.0]}
    measured = Rounds({"slow": [2.0, 30.0, 3.0], "fast": [1.0, 10.0, 1.0]}, processor_seconds, {})
    assert measured.speedup("fast", "slow") == 3
    assert measured.speedup("slow", "slow") == 1
    assert measured.processor_speedup("fast", "slow") == 2
    assert measured.median_seconds("slow") == 3
    assert measured.row("fast", "slow", 4.0, torch.device("cpu"), batch_size=2) == {
        "seconds": 1.0, **RealTimeFactor(0.25, described_processor(), 2).to_json(), "wall_speedup": 3.0,
    }  # fmt: skip


def test_a_real_time_factor_says_what_it_is_of() -> None:
    fast, slow = RealTimeFactor(0.01, "NVIDIA H200", 8), RealTimeFactor(0.03, "AMD EPYC, 1 thread", 2)
    assert str(fast) == "RTF 0.01 (NVIDIA H200, batch 8)"
    assert RealTimeFactor.of_json(fast.to_json()) == fast
    mean = RealTimeFactor.mean([fast, None, slow])
    assert mean == RealTimeFactor(pytest.approx(0.02), "AMD EPYC, 1 thread and NVIDIA H200", 8)


def test_what_nobody_wrote_down_is_not_made_up() -> None:
    assert str(RealTimeFactor.of_json({"real_time_factor": 0.25})) == "RTF 0.25"  # as clips of earlier versions say
    assert [RealTimeFactor.of_json(facts) for facts in ({}, {"real_time_factor": "fast"})] == [None, None]
    assert RealTimeFactor.mean([None]) is None
