"""Latency: how often the callable runs, and the arithmetic."""

import pytest

from foley.metrics.latency import Latency, measure_latency


def test_warm_up_calls_are_made_and_not_timed() -> None:
    calls: list[int] = []
    measured = measure_latency(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5
    assert measured.repeats == 3
    assert 0 <= measured.minimum_seconds <= measured.median_seconds <= measured.maximum_seconds


def test_real_time_factor() -> None:
    assert Latency(2.0, 1.0, 3.0, repeats=5).real_time_factor(audio_seconds=10.0) == 5.0


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        measure_latency(lambda: None, repeats=0)
