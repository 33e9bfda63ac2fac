"""Wall-clock seconds of a piece of work, with warm-up and device synchronisation, and its peak memory.

Rivals are timed in turns (`measure_rounds`), so that what else the machine does slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from foley.core.devices import resolve_device, synchronise

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def real_time_factor(computing_seconds: float, audio_seconds: float) -> float:
    """RTF: seconds of computing for a second of audio; under 1 is faster than the sound itself lasts.

    >>> real_time_factor(computing_seconds=2.5, audio_seconds=10.0)
    0.25
    """
    return computing_seconds / audio_seconds


@dataclass(frozen=True)
class Latency:
    """Seconds per call over `repeats` timed calls."""

    median_seconds: float
    minimum_seconds: float
    maximum_seconds: float
    repeats: int

    def real_time_factor(self, audio_seconds: float) -> float:
        """See `real_time_factor`."""
        return real_time_factor(self.median_seconds, audio_seconds)


@dataclass(frozen=True)
class Rounds(Generic[Name, Result]):
    """Seconds of every call in every round, and what it returned in the last one.

    `processor_seconds` are summed over threads, and of the CPU alone.
    """

    seconds: Mapping[Name, list[float]]
    processor_seconds: Mapping[Name, list[float]]
    results: Mapping[Name, Result]

    def median_seconds(self, name: Name) -> float:
        return statistics.median(self.seconds[name])

    def speedup(self, name: Name, reference: Name) -> float:
        """The median over rounds of the reference's seconds over this one's in the same round."""
        pairs = zip(self.seconds[reference], self.seconds[name], strict=True)
        return statistics.median(base / seconds for base, seconds in pairs)

    def row(self, name: Name, reference: Name, audio_seconds: float) -> dict[str, float]:
        """What a table says of this one: median `seconds`, their RTF, and `wall_speedup` over the reference."""
        seconds = self.median_seconds(name)
        factor = real_time_factor(seconds, audio_seconds)
        return {"seconds": seconds, "real_time_factor": factor, "wall_speedup": self.speedup(name, reference)}


def _timed(call: Callable[[], Result]) -> tuple[Result, float, float]:
    """What `call` returns, and its wall-clock and processor seconds."""
    device = resolve_device("auto")  # work may lie on a CPU beside an idle GPU, for which nothing waits
    synchronise(device)
    start, processor_start = time.perf_counter(), time.process_time()
    result = call()
    synchronise(device)
    return result, time.perf_counter() - start, time.process_time() - processor_start


def measure_latency(call: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Latency:
    """Time `repeats` calls after `warmup` untimed ones; raises ValueError where there is nothing to time.

    >>> latency = measure_latency(lambda: torch.randn(100).sum(), repeats=3)
    >>> latency.minimum_seconds <= latency.median_seconds <= latency.maximum_seconds
    True
    """
    seconds = measure_rounds({"call": call}, repeats, warmup).seconds["call"]
    return Latency(statistics.median(seconds), min(seconds), max(seconds), repeats)


def measure_rounds(calls: Mapping[Name, Callable[[], Result]], rounds: int, warmup: int = 1) -> Rounds[Name, Result]:
    """Time rivals in turns, every call once a round, so that a busy machine is busy for all of them.

    The `warmup` rounds before are not timed. Raises ValueError where there is nothing to time.
    """
    if rounds < 1:
        raise ValueError(f"latency needs at least one timed call, got repeats={rounds}")
    measured = Rounds[Name, Result]({name: [] for name in calls}, {name: [] for name in calls}, results := {})
    for index in range(warmup + rounds):
        for name, call in calls.items():
            results[name], seconds, processor_seconds = _timed(call)
            if index >= warmup:
                measured.seconds[name].append(seconds)
                measured.processor_seconds[name].append(processor_seconds)
    return measured


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, so that `peak_memory_bytes` is of what follows; on a CPU this needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int | None:
    """Allocated memory on a GPU, resident memory on a CPU, at its largest; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
