"""What a generation costs with its accelerator and without: counted while it runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from foley.accel.caching.layer_cache import LayerCache
from foley.accel.combined import Combined, NoAcceleration
from foley.accel.cost import EvaluationMacs, MacCounter, RunCost, count_call_macs, run_cost
from foley.accel.layers import CacheableLayer, find_cacheable_layers
from foley.diffusion.context import Accelerator, RunContext, StepContext


class CostMeter:
    """Passes everything on to `accelerator`, and counts the first evaluation of the first run.

    Caches compute everything there, so that it costs what it does without them; the others follow from the schedule.
    Where something is attached that declares `changes_cost`, such as sparse attention, the same call is counted without
    it, from shapes alone. The result of the generation is not changed. Neither a denoiser of which anything is compiled
    is counted, nor an accelerator of another kind, such as a recorder.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        parts = _parts(accelerator)
        self._cache = next((part for part in parts if isinstance(part, LayerCache)), None)
        self._changes_layers = any(_changes_cost(part) for part in parts)
        self._is_known = all(isinstance(part, LayerCache | NoAcceleration) or _changes_cost(part) for part in parts)
        self._layers: list[CacheableLayer] = []
        self._counter: MacCounter | None = None
        self._context: StepContext | None = None
        self._denoiser: nn.Module | None = None
        self._call: list[tuple[Any, Any]] = []
        self._hooks = ExitStack()

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """As the accelerator's own."""
        with ExitStack() as stack:
            stack.callback(self._hooks.close)
            if self._context is None and self._is_known and not _is_compiled(denoiser):
                self._denoiser, self._counter = denoiser, MacCounter()
                self._layers = find_cacheable_layers(denoiser) if self._cache is not None else []
                self._hooks.enter_context(self._counter.watching(self._layers))
                if self._changes_layers:
                    self._hooks.enter_context(_remembered_call(denoiser, self._call))
            stack.enter_context(self._accelerator.attach(denoiser))
            yield

    def on_run_start(self, run: RunContext) -> None:
        self._accelerator.on_run_start(run)

    def on_evaluation_start(self, context: StepContext) -> None:
        self._accelerator.on_evaluation_start(context)
        if self._counter is not None and self._context is None:
            self._counter.start()
            self._context = context

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if self._counter is not None:
            self._counter.stop()
            self._hooks.close()
        self._accelerator.on_evaluation_end(context, prediction)

    def on_run_end(self) -> None:
        if self._counter is not None:
            self._counter.stop()
        self._accelerator.on_run_end()

    def cost_per_item(self) -> RunCost | None:
        """Of one item of the batch, guidance included; None where nothing was counted. Ask once all is detached."""
        if self._counter is None or self._context is None:
            return None
        run, first = self._context.run, self._context.evaluation
        macs = self._counter.evaluation([layer.name for layer in self._layers])
        cost = self._cost(macs, run, first)
        return RunCost(cost.macs_uncached // run.batch_size, cost.macs_cached // run.batch_size)

    def _cost(self, macs: EvaluationMacs, run: RunContext, first: int) -> RunCost:
        plain = macs.total * (run.num_evaluations - first)
        schedule = None if self._cache is None else self._cache.schedule
        accelerated = plain if schedule is None else run_cost(schedule, macs, first).macs_cached
        if not self._changes_layers:
            return RunCost(plain, accelerated)
        assert self._denoiser is not None
        return RunCost(count_call_macs(self._denoiser, *self._call[0]) * (run.num_evaluations - first), accelerated)

    def describe(self) -> dict[str, float]:
        """What the JSON of each clip says of it.

        `macs` of one clip, `macs_uncached` without the accelerator, and `mac_speedup`, how many times fewer they are.
        """
        cost = self.cost_per_item()
        if cost is None:
            return {}
        return {"macs": cost.macs_cached, "macs_uncached": cost.macs_uncached, "mac_speedup": cost.speedup}


def _parts(accelerator: Accelerator) -> list[Accelerator]:
    if isinstance(accelerator, Combined):
        return [part for inner in accelerator.accelerators for part in _parts(inner)]
    return [accelerator]


def _changes_cost(accelerator: Accelerator) -> bool:
    return getattr(accelerator, "changes_cost", False)


def _is_compiled(denoiser: nn.Module) -> bool:
    """As a whole or in parts."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in denoiser.modules())


@contextmanager
def _remembered_call(denoiser: nn.Module, call: list[tuple[Any, Any]]) -> Iterator[None]:
    """Put the arguments of the first call inside the context into `call`."""

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not call:
            call.append((args, kwargs))

    hook = denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
