"""Multiply-accumulates (MACs) of a run, with and without its accelerator: counted, computed from a schedule, metered.

Everything that states MACs, or TMACs as the papers' tables do, has them from here. `MacCounter` counts what runs.
`run_cost` computes from one uncached evaluation and a schedule what a cached run costs. `CostMeter` does both while a
generation runs, which it leaves as it is to the last bit.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foley.accel.caching.schedule import CacheSchedule
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers
from foley.core.hashing import is_compiled
from foley.diffusion.context import Accelerator, RunContext, StepContext, forecast

_FLOPS_PER_MAC = 2  # a multiplication and an addition, which PyTorch counts as two


def tmacs(macs: int) -> float:
    """In units of 10^12, as the tables of SmoothCache state them.

    >>> tmacs(2_500_000_000_000)
    2.5
    """
    return macs / 1e12


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
    """From the shapes `[B, H, N, D]`; keys and values that several heads share count for each of these."""
    flops: int = sdpa_flop_count(query, (*query[:2], *key[2:]), (*query[:2], *value[2:]))
    return flops


# The count is the same on every device. PyTorch knows those of the fused kernels for GPUs, without shared keys.
_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


class MacCounter:
    """Counts matrix products and convolutions while it is started, in all and of each layer.

    Example:
        >>> counter, linear = MacCounter(), nn.Linear(8, 3)
        >>> counter.start()
        >>> output = linear(torch.randn(5, 8))
        >>> counter.stop()
        >>> counter.total  # 5 rows, 8 inputs, 3 outputs
        120
    """

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}  # MACs, by the layer's index
        self._before: dict[int, int] = {}  # the total as the layer was entered
        self._earlier = 0  # before it was started last
        formulas = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention_flops for name in _FUSED}
        self._flops = FlopCounterMode(display=False, custom_mapping=formulas)
        self._running = ExitStack()
        self.is_running = False

    @property
    def total(self) -> int:
        """Everything counted."""
        return self._earlier + self._flops.get_total_flops() // _FLOPS_PER_MAC

    def start(self) -> None:
        """Begin to count; what is compiled runs as it is meanwhile, since the products of a graph cannot be seen."""
        self._earlier = self.total  # entered again, PyTorch's counter forgets
        self._running.enter_context(torch.compiler.set_stance("force_eager"))
        self._running.enter_context(self._flops)
        self.is_running = True

    def stop(self) -> None:
        """Count no more; nothing happens where nothing was started."""
        self.is_running = False
        self._running.close()

    def count(self, call: Callable[[], object]) -> None:
        """What `call()` computes."""
        self.start()
        try:
            call()
        finally:
            self.stop()

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
            # Added up, should a layer be called more than once.
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
            watched = [(i, module) for i, layer in enumerate(layers) for module in (layer.module, *layer.feeders)]
            for index, module in watched:
                begin = module.register_forward_pre_hook(partial(_call_with, self.enter, index))
                end = module.register_forward_hook(partial(_call_with, self.leave, index))
                stack.callback(begin.remove)
                stack.callback(end.remove)
            yield


def _call_with(hook: Callable[[int], None], index: int, *_: Any) -> None:
    hook(index)


def count_evaluation_macs(denoiser: nn.Module, evaluate: Callable[[], object]) -> EvaluationMacs:
    """Count while `evaluate()` calls `denoiser` once; of its own forwards, where nothing is attached."""
    layers, counter = find_cacheable_layers(denoiser), MacCounter()
    with torch.no_grad(), counter.watching(layers):
        counter.count(evaluate)
    return counter.evaluation([layer.name for layer in layers])


def count_macs(call: Callable[[], object]) -> int:
    """Of everything that `call()` computes.

    >>> left, right = torch.randn(2, 3), torch.randn(3, 4)
    >>> count_macs(lambda: left @ right)
    24
    """
    counter = MacCounter()
    with torch.inference_mode(False), torch.no_grad():  # inference mode cannot dispatch weight norm to a counter
        counter.count(call)
    return counter.total


def count_call_macs(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of one call with these arguments, from shapes alone: nothing is computed and no memory is taken."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # weights and arguments are real tensors
        return count_macs(partial(denoiser, *args, **kwargs))


def run_cost(
    schedule: CacheSchedule,
    macs: EvaluationMacs,
    first_evaluation: int = 0,
    computed_evaluations: Sequence[bool] | None = None,
    branches: Sequence[int] | None = None,
) -> RunCost:
    """What a run that follows `schedule` costs, from the cost of one evaluation; it computes all where it begins.

    An evaluation that `computed_evaluations` leaves out costs nothing, whatever its row says; None is all of them.

    Args:
        macs: of the evaluation `first_evaluation`.
        branches: of guidance, at each evaluation, where it begins or ends on the way (`RunContext.branches`).
    """
    compute = schedule.compute[first_evaluation:]  # [evaluations left, layers]
    counts = torch.tensor(branches or [1] * len(schedule.compute))[first_evaluation:]  # rows, in those of an item
    share = int(counts[0])  # of what was counted, a branch costs this part
    uncached = macs.total // share * int(counts.sum())
    if computed_evaluations is not None:
        # Rows of skipped evaluations say what layers would have done: nothing ran there.
        ran = torch.tensor(computed_evaluations[first_evaluation:])
        compute, counts = compute[ran], counts[ran]
    reused = (~compute[1:] * counts[1:, None]).sum(dim=0).tolist()  # how often, of each layer
    # A reused layer costs nothing. What lies outside of layers runs at every evaluation.
    saved = sum(count * (macs.layers[name] // share) for name, count in zip(schedule.layer_names, reused, strict=True))
    return RunCost(uncached, macs.total // share * int(counts.sum()) - saved)


def last_run_cost(
    accelerator: Accelerator,
    macs: EvaluationMacs,
    num_evaluations: int,
    first_evaluation: int = 0,
    branches: Sequence[int] | None = None,
) -> RunCost:
    """What the last run under `accelerator` cost, from the cost of one evaluation.

    Its parts tell: caches of layers or blocks by `schedule`, what skips whole evaluations by `computed_evaluations`.
    `branches` are as for `run_cost`.
    """
    parts = _parts(accelerator)
    computed = next((part.computed_evaluations for part in parts if hasattr(part, "computed_evaluations")), None)
    schedule = next((part.schedule for part in parts if hasattr(part, "schedule")), None)
    if schedule is not None:
        return run_cost(schedule, macs, first_evaluation, computed, branches)
    counts = list(branches or [1] * num_evaluations)
    ran = range(first_evaluation, num_evaluations)
    total = macs.total // counts[first_evaluation]  # of one branch, or of the joint batch
    whole, computes = sum(counts[first_evaluation:]), [computed is None or computed[index] for index in ran]
    return RunCost(total * whole, total * sum(counts[index] for index, runs in zip(ran, computes, strict=True) if runs))


class CostMeter:
    """Passes everything on to `accelerator`, and counts the first evaluation of the first run.

    Caches compute everything there, so that it costs what it does without them; the others follow from the schedule.
    Guidance branches that run one after the other are all counted.
    Where something is attached that declares `changes_cost`, such as sparse attention, the same call is counted without
    it, from shapes alone. The result of the generation is not changed. Neither a denoiser of which anything is compiled
    is counted, nor an accelerator of another kind, such as a recorder.

    Example: `CostMeter(Fora(interval=2))` is given to the sampler in the place of the accelerator; after the generation
    `describe()` says what it cost. `TextToAudio.generate` does so for every accelerator.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        parts = _parts(accelerator)
        # One at most: a second one could not attach.
        self._cache: Any = next((part for part in parts if hasattr(part, "schedule")), None)
        # Then what is counted is not the plain evaluation.
        self._changes_layers = any(_changes_cost(part) for part in parts)
        self._is_known = all(_is_counted(part) or _changes_cost(part) for part in parts)
        self._layers: list[CacheableLayer] = []
        self._counter: MacCounter | None = None
        self._context: StepContext | None = None  # that of the counted evaluation
        self._denoiser: nn.Module | None = None
        self._calls: list[tuple[Any, Any]] = []  # their arguments, kept only where layers are changed
        self._hooks = ExitStack()

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """As the accelerator's own."""
        with ExitStack() as stack:
            stack.callback(self._hooks.close)  # on error too
            if self._context is None and self._is_known and not _is_out_of_sight(denoiser):
                self._denoiser, self._counter = denoiser, MacCounter()
                self._layers = find_cacheable_layers(denoiser) if self._cache is not None else []
                self._hooks.enter_context(self._counter.watching(self._layers))
                if self._changes_layers:
                    self._hooks.enter_context(_remembered_calls(denoiser, self._calls))
            stack.enter_context(self._accelerator.attach(denoiser))
            yield

    def graph_pattern(self) -> Hashable | None:
        """The accelerator's; counting is of the first evaluation, which is never recorded."""
        pattern: Callable[[], Hashable | None] = getattr(self._accelerator, "graph_pattern", lambda: None)
        return pattern()

    def on_run_start(self, run: RunContext) -> None:
        self._accelerator.on_run_start(run)

    def on_evaluation_start(self, context: StepContext) -> None:
        counted = self._context = self._context or context
        is_counted = context.run is counted.run and context.evaluation == counted.evaluation
        if not is_counted:
            self._hooks.close()  # the other evaluations run at full speed
        self._accelerator.on_evaluation_start(context)
        # Last, so that what the accelerator does beforehand is no part of the count.
        if self._counter is not None and is_counted:
            self._counter.start()

    def forecast(self, context: StepContext, noisy: Tensor) -> Tensor | None:
        """The accelerator's, which makes none at the first evaluation."""
        return forecast([self._accelerator], context, noisy)

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if self._counter is not None:
            self._counter.stop()  # what the loop does in between is no part of it
        self._accelerator.on_evaluation_end(context, prediction)

    def on_run_end(self) -> None:
        if self._counter is not None:
            self._counter.stop()
            self._hooks.close()
        self._accelerator.on_run_end()

    def cost_per_item(self) -> RunCost | None:
        """Of one item of the batch, guidance included; None where nothing was counted. Ask once all is detached."""
        if self._counter is None or self._context is None:
            return None
        run, first = self._context.run, self._context.evaluation
        macs = self._counter.evaluation([layer.name for layer in self._layers])
        cost = self._cost(macs, run, first)
        # Of rows the denoiser sees more: guidance is part of what an item costs.
        return RunCost(cost.macs_uncached // run.batch_size, cost.macs_cached // run.batch_size)  # items cost alike

    def _cost(self, macs: EvaluationMacs, run: RunContext, first: int) -> RunCost:
        cost = last_run_cost(self._accelerator, macs, run.num_evaluations, first, run.branches)
        if not self._changes_layers:
            return cost
        assert self._denoiser is not None
        # The same calls once more, with the denoiser as it is when nothing is attached.
        plain = sum(count_call_macs(self._denoiser, *call) for call in self._calls)
        counts = run.branches or (1,) * run.num_evaluations
        return RunCost(plain // counts[first] * sum(counts[first:]), cost.macs_cached)

    def describe(self) -> dict[str, Any]:
        """What the JSON of each clip says of it.

        `macs` of one clip, `macs_uncached` without the accelerator, and `mac_speedup`, how many times fewer they are;
        and what the accelerator itself has to say of the last run.
        """
        facts: dict[str, Any] = {}
        for part in _parts(self._accelerator):
            facts |= getattr(part, "describe", dict)()
        cost = self.cost_per_item()
        if cost is None:
            return facts
        return {**facts, "macs": cost.macs_cached, "macs_uncached": cost.macs_uncached, "mac_speedup": cost.speedup}


def _parts(accelerator: Accelerator) -> list[Accelerator]:
    if isinstance(accelerator, Combined):
        return [part for inner in accelerator.accelerators for part in _parts(inner)]
    return [accelerator]


def _is_counted(accelerator: Accelerator) -> bool:
    """Whether `last_run_cost` knows what it saves."""
    tells = any(hasattr(accelerator, name) for name in ("schedule", "computed_evaluations"))
    return tells or isinstance(accelerator, NoAcceleration)


def _changes_cost(accelerator: Accelerator) -> bool:
    return getattr(accelerator, "changes_cost", False)


def _is_out_of_sight(denoiser: nn.Module) -> bool:
    """Compiled, as a whole or in parts, or exported: its products cannot be counted."""
    return getattr(denoiser, "is_exported", False) or is_compiled(denoiser)


@contextmanager
def _remembered_calls(denoiser: nn.Module, calls: list[tuple[Any, Any]]) -> Iterator[None]:
    """Put the arguments of every call inside the context into `calls`."""

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    hook = denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
