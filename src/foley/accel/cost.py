"""Multiply-accumulates of a run, with and without a cache schedule."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foley.accel.layers import Forward, find_cacheable_layers, replaced_forwards
from foley.accel.schedule import CacheSchedule

_FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class EvaluationMacs:
    """MACs of one uncached evaluation of a denoiser: in all, and of each cacheable layer by name."""

    total: int
    layers: Mapping[str, int]


@dataclass(frozen=True)
class RunCost:
    """MACs of all evaluations of a run."""

    macs_uncached: int
    macs_cached: int

    @property
    def speedup(self) -> float:
        """How many times fewer MACs the cached run takes."""
        return self.macs_uncached / self.macs_cached


class MacCounter:
    """Counts matrix products and convolutions while it is started, in all and of each layer.

    Attention takes the unfused kernel meanwhile, so the count is the same on every device.
    """

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}
        self._flops = FlopCounterMode(display=False)
        self._running: ExitStack | None = None

    @property
    def total(self) -> int:
        """Everything counted."""
        return self._flops.get_total_flops() // _FLOPS_PER_MAC

    def start(self) -> None:
        """Begin to count."""
        self._running = ExitStack()
        self._running.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._running.enter_context(self._flops)

    def stop(self) -> None:
        """Count no more; nothing happens where nothing was started."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def evaluation(self, names: Sequence[str]) -> EvaluationMacs:
        """What was counted, of layers of these names."""
        return EvaluationMacs(self.total, {name: self.layers[index] for index, name in enumerate(names)})

    def call(self, index: int, layer: Forward, *args: Any, **kwargs: Any) -> Any:
        """Layer `index`, counted as such while the counter runs."""
        before = self.total
        output = layer(*args, **kwargs)
        if self._running is not None:
            self.layers[index] = self.layers.get(index, 0) + self.total - before
        return output


def count_evaluation_macs(denoiser: nn.Module, evaluate: Callable[[], object]) -> EvaluationMacs:
    """Count while `evaluate()` calls `denoiser` once, with nothing attached."""
    layers, counter = find_cacheable_layers(denoiser), MacCounter()
    with torch.no_grad(), replaced_forwards(layers, lambda index, forward: partial(counter.call, index, forward)):
        counter.start()
        try:
            evaluate()
        finally:
            counter.stop()
    return counter.evaluation([layer.name for layer in layers])


def run_cost(schedule: CacheSchedule, macs: EvaluationMacs) -> RunCost:
    """What a run that follows `schedule` costs, from the cost of one evaluation."""
    reused = (~schedule.compute).sum(dim=0).tolist()
    saved = sum(count * macs.layers[name] for name, count in zip(schedule.layer_names, reused, strict=True))
    uncached = macs.total * len(schedule.compute)
    return RunCost(uncached, uncached - saved)
