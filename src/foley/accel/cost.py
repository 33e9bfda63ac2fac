"""Multiply-accumulates of a run, with and without a cache schedule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foley.accel.layers import find_cacheable_layers
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


def count_evaluation_macs(denoiser: nn.Module, evaluate: Callable[[], object]) -> EvaluationMacs:
    """Count the matrix products and convolutions while `evaluate()` calls `denoiser` once, with nothing attached.

    Attention takes the unfused kernel meanwhile, so the count is the same on every device.
    """
    layers = find_cacheable_layers(denoiser)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        evaluate()
    counts, root = counter.get_flop_counts(), type(denoiser).__name__
    macs = {layer.name: sum(counts[f"{root}.{layer.name}"].values()) // _FLOPS_PER_MAC for layer in layers}
    return EvaluationMacs(counter.get_total_flops() // _FLOPS_PER_MAC, macs)


def run_cost(schedule: CacheSchedule, macs: EvaluationMacs) -> RunCost:
    """What a run that follows `schedule` costs, from the cost of one evaluation."""
    reused = (~schedule.compute).sum(dim=0).tolist()
    saved = sum(count * macs.layers[name] for name, count in zip(schedule.layer_names, reused, strict=True))
    uncached = macs.total * len(schedule.compute)
    return RunCost(uncached, uncached - saved)
