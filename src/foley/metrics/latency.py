"""Wall-clock seconds of a piece of work, with warm-up and device synchronisation, and its peak memory.

Rivals are timed in turns (`measure_rounds`), so that what else the machine does slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from foley.core.devices import machine_name, resolve_device, synchronise

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
class RealTimeFactor:
    """RTF (AudioLCM, section 4.1), with what it is of: without these two it says nothing.

    Args:
        value: see `real_time_factor`.
        machine: what computed, as `foley.core.devices.machine_name` has it; empty where nobody wrote it down.
        batch_size: clips computed together; None where nobody wrote it down.

    >>> print(RealTimeFactor(0.012345, "NVIDIA H200", 8))
    RTF 0.0123 (NVIDIA H200, batch 8)
    """

    value: float
    machine: str = ""
    batch_size: int | None = None

    def __str__(self) -> str:
        return f"RTF {self.in_words()}"

    def in_words(self) -> str:
        """The number, and in brackets what it is of."""
        return f"{self.value:.3g}{f' ({self.where})' if self.where else ''}"

    @property
    def where(self) -> str:
        """What it is of, as far as that is known."""
        return ", ".join(filter(None, (self.machine, f"batch {self.batch_size}" if self.batch_size else "")))

    def to_json(self) -> dict[str, Any]:
        """What the JSON of a clip, or the row of a benchmark, says of it."""
        return {
            "real_time_factor": float(f"{self.value:.8g}"),
            "machine": self.machine,
            "batch_size": self.batch_size,
        }

    @classmethod
    def of(
        cls, computing_seconds: float, audio_seconds: float, device: torch.device, batch_size: int = 1
    ) -> "RealTimeFactor":
        """Of what was timed on `device`; both are sums over the batch."""
        return cls(real_time_factor(computing_seconds, audio_seconds), machine_name(device), batch_size)

    @classmethod
    def of_json(cls, facts: Mapping[str, Any]) -> "RealTimeFactor | None":
        """Out of what `to_json` wrote into it; None where there is nothing of it."""
        value, machine, batch_size = (facts.get(name) for name in ("real_time_factor", "machine", "batch_size"))
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return cls(float(value), str(machine or ""), batch_size if isinstance(batch_size, int) else None)

    @classmethod
    def mean(cls, clips: Iterable["RealTimeFactor | None"]) -> "RealTimeFactor | None":
        """Of a set of clips: all machines, and the largest batch, for the last one of a set is what is left over.

        None where no clip has one.
        """
        known = [clip for clip in clips if clip is not None]
        if not known:
            return None
        machines = sorted({clip.machine for clip in known if clip.machine})
        batch_size = max(clip.batch_size or 0 for clip in known) or None
        return cls(statistics.fmean(clip.value for clip in known), " and ".join(machines), batch_size)

    @classmethod
    def median(cls, runs: Sequence["RealTimeFactor"]) -> "RealTimeFactor":
        """Of runs of the same work on the same machine."""
        return replace(runs[0], value=statistics.median(run.value for run in runs))


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

    def median_processor_seconds(self, name: Name) -> float:
        return statistics.median(self.processor_seconds[name])

    def speedup(self, name: Name, reference: Name) -> float:
        """The median over rounds of the reference's seconds over this one's in the same round."""
        return _median_ratio(self.seconds[reference], self.seconds[name])

    def processor_speedup(self, name: Name, reference: Name) -> float:
        """The same in processor time, which other work on the machine hardly moves; of what a CPU computes."""
        return _median_ratio(self.processor_seconds[reference], self.processor_seconds[name])

    def row(
        self, name: Name, reference: Name, audio_seconds: float, device: torch.device, batch_size: int = 1
    ) -> dict[str, Any]:
        """What a table says of this one: median `seconds`, their RTF, and `wall_speedup` over the reference.

        Args:
            audio_seconds, device, batch_size: as `RealTimeFactor.of` takes them.
        """
        seconds = self.median_seconds(name)
        rtf = RealTimeFactor.of(seconds, audio_seconds, device, batch_size).to_json()
        return {"seconds": seconds, **rtf, "wall_speedup": self.speedup(name, reference)}


def _median_ratio(base: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(above / below for above, below in zip(base, other, strict=True))


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
