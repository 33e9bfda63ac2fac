"""Multiply-accumulates of a run, with and without a cache schedule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foley.accel.caching.schedule import CacheSchedule
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers

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


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """From the shapes `[B, H, N, D]`."""
    flops: int = sdpa_flop_count(query, key, value)
    return flops


class MacCounter:
    """Counts matrix products and convolutions while it is started, in all and of each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}
        self._before: dict[int, int] = {}
        # The count of attention is the same on every device: PyTorch knows those of the fused kernels for GPUs.
        formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        self._flops = FlopCounterMode(display=False, custom_mapping=formulas)
        self._running = ExitStack()
        self.is_running = False

    @property
    def total(self) -> int:
        """Everything counted."""
        return self._flops.get_total_flops() // _FLOPS_PER_MAC

    def start(self) -> None:
        """Begin to count; what is compiled runs as it is meanwhile, since the products of a graph cannot be seen."""
        self._running.enter_context(torch.compiler.set_stance("force_eager"))
        self._running.enter_context(self._flops)
        self.is_running = True

    def stop(self) -> None:
        """Count no more; nothing happens where nothing was started."""
        self.is_running = False
        self._running.close()

    def evaluation(self, names: Sequence[str]) -> EvaluationMacs:
        """What was counted, of layers of these names."""
        return EvaluationMacs(self.total, {name: self.layers[index] for index, name in enumerate(names)})

    def enter(self, index: int) -> None:
        """Layer `index` begins."""
        if self.is_running:
            self._before[index] = self.total

    def leave(self, index: int) -> None:
        """Layer `index` has ended."""
        if self.is_running:
            self.layers[index] = self.layers.get(index, 0) + self.total - self._before[index]

    def call(self, index: int, layer: Forward, *args: Any, **kwargs: Any) -> Any:
        """Layer `index`, counted as such while the counter runs."""
        self.enter(index)
        output = layer(*args, **kwargs)
        self.leave(index)
        return output

    @contextmanager
    def watching(self, layers: Sequence[CacheableLayer]) -> Iterator[None]:
        """Count the layers as such whenever they are called inside the context, whatever their forwards are then."""
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                begin = layer.module.register_forward_pre_hook(partial(_call_with, self.enter, index))
                end = layer.module.register_forward_hook(partial(_call_with, self.leave, index))
                stack.callback(begin.remove)
                stack.callback(end.remove)
            yield


def _call_with(hook: Callable[[int], None], index: int, *_: Any) -> None:
    hook(index)


def count_evaluation_macs(denoiser: nn.Module, evaluate: Callable[[], object]) -> EvaluationMacs:
    """Count while `evaluate()` calls `denoiser` once; of its own forwards, where nothing is attached."""
    layers, counter = find_cacheable_layers(denoiser), MacCounter()
    with torch.no_grad(), counter.watching(layers):
        counter.start()
        try:
            evaluate()
        finally:
            counter.stop()
    return counter.evaluation([layer.name for layer in layers])


def count_call_macs(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of one call with these arguments, from shapes alone: nothing is computed and no memory is taken."""
    counter = MacCounter()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        counter.start()
        try:
            denoiser(*args, **kwargs)
        finally:
            counter.stop()
    return counter.total


def run_cost(schedule: CacheSchedule, macs: EvaluationMacs, first_evaluation: int = 0) -> RunCost:
    """What a run that follows `schedule` costs, from the cost of one evaluation; it computes all where it begins."""
    compute = schedule.compute[first_evaluation:]
    reused = (~compute[1:]).sum(dim=0).tolist()
    saved = sum(count * macs.layers[name] for name, count in zip(schedule.layer_names, reused, strict=True))
    uncached = macs.total * len(compute)
    return RunCost(uncached, uncached - saved)
