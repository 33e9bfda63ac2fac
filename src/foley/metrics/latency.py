"""Wall-clock latency of a callable, with warm-up and device synchronisation."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latency:
    """Seconds per call over `repeats` timed calls."""

    median_seconds: float
    minimum_seconds: float
    maximum_seconds: float
    repeats: int

    def real_time_factor(self, audio_seconds: float) -> float:
        """Seconds of audio made per second of wall-clock time."""
        return audio_seconds / self.median_seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_latency(call: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Latency:
    """Time `repeats` calls after `warmup` untimed ones; raises ValueError where there is nothing to time."""
    if repeats < 1:
        raise ValueError(f"latency needs at least one timed call, got repeats={repeats}")
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        call()
        _synchronise()
        seconds.append(time.perf_counter() - start)
    return Latency(statistics.median(seconds), min(seconds), max(seconds), repeats)
