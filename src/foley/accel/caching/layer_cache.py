"""LayerCache: the one mechanism that executes a cache schedule, whatever policy made it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from foley.accel.caching.schedule import CacheSchedule, SignatureMismatchError
from foley.accel.layers import Forward, find_cacheable_layers, replaced_forwards
from foley.diffusion.context import RunContext, StepContext


class Reuse(Protocol):
    """The memory of one layer and guidance branch during a run."""

    def store(self, evaluation: int, output: Any) -> None:
        """Remember what the layer computed at `evaluation`."""

    def recall(self, evaluation: int) -> Any:
        """What to use at a later evaluation; something has been stored."""


@dataclass
class Hold:
    """The last output, as AudioCache and SmoothCache reuse it."""

    output: Any = None

    def store(self, evaluation: int, output: Any) -> None:
        self.output = output

    def recall(self, evaluation: int) -> Any:
        return self.output


@dataclass
class Taylor:
    """The line through the last two computed outputs; the last output until there are two.

    The first-order forecast of TaylorSeer (Liu et al. 2025), with the evaluation as its variable. Keeps two outputs
    where `Hold` keeps one.
    """

    evaluation: int = 0
    output: Any = None
    slope: Any = None

    def store(self, evaluation: int, output: Any) -> None:
        if self.output is not None:
            self.slope = (output - self.output) / (evaluation - self.evaluation)
        self.evaluation, self.output = evaluation, output

    def recall(self, evaluation: int) -> Any:
        if self.slope is None:
            return self.output
        return self.output + (evaluation - self.evaluation) * self.slope


_REUSES: dict[str, type[Reuse]] = {"hold": Hold, "taylor": Taylor}


def reuse_by_name(name: str) -> type[Reuse]:
    """ "hold" or "taylor"; raises ValueError for any other name."""
    if name not in _REUSES:
        raise ValueError(f"accel.reuse must be one of {', '.join(_REUSES)}, got {name!r}")
    return _REUSES[name]


class SchedulePlan(Protocol):
    """Decides on the schedule once the run is known; a CacheSchedule is its own plan."""

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule: ...


class LayerCache:
    """Reuse the outputs of layers where the schedule says so; their norm, modulation and body are then not run.

    Outputs are kept per (branch, layer) for one run, before gate and residual, which use the current step
    (AudioCache, Fig. 2). The evaluation comes from the sampler's context; calls are never counted. A run that begins
    in the middle of the schedule computes each layer at its first call, whatever the schedule says.

    Args:
        plan: decides what is computed.
        reuse: makes what stands in for a layer that is not.
    """

    def __init__(self, plan: SchedulePlan, reuse: Callable[[], Reuse] = Hold) -> None:
        self._plan = plan
        self._make_reuse = reuse
        self._denoiser: nn.Module | None = None
        self._layer_names: tuple[str, ...] = ()
        self.schedule: CacheSchedule | None = None
        self._reset()

    def _reset(self) -> None:
        self._table: list[list[bool]] = []
        self._row: Sequence[bool] | None = None
        self._evaluation = 0
        self._branches: dict[str, dict[int, Reuse]] = {}
        self._memories: dict[int, Reuse] = {}

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Replace the forwards of the denoiser's cacheable layers inside the context, and restore them on any exit.

        Raises:
            ValueError: the denoiser has no cacheable layer.
            RuntimeError: an accelerator is attached to it already.
        """
        layers = find_cacheable_layers(denoiser)
        self._layer_names = tuple(layer.name for layer in layers)
        with replaced_forwards(denoiser, layers, self._caching_forward, self._skipping_norm):
            self._denoiser = denoiser
            try:
                yield
            finally:
                self._denoiser = None
                self._reset()

    def _caching_forward(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._row is None:
                raise RuntimeError("a LayerCache is attached, but the sampler does not call it: pass it as a callback")
            memory = self._memories.get(index)
            if memory is not None and not self._row[index]:
                return memory.recall(self._evaluation)
            output = original(*args, **kwargs)
            if memory is None:
                memory = self._memories[index] = self._make_reuse()
            memory.store(self._evaluation, output)
            return output

        return forward

    def _skipping_norm(self, index: int, original: Forward) -> Forward:
        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._row is not None and index in self._memories and not self._row[index]:
                return x  # of no use to the layer, which is reused
            return original(x, *args, **kwargs)

        return forward

    def on_run_start(self, run: RunContext) -> None:
        """Clear the cache and decide on the schedule.

        Raises:
            RuntimeError: nothing is attached.
            SignatureMismatchError: the schedule was made for another model or other layers of it, another solver or
                number of steps.
        """
        if self._denoiser is None:
            raise RuntimeError("LayerCache has no denoiser: generate inside its `attach(denoiser)` context")
        self._reset()
        self.schedule = self._plan.schedule_for(run, self._denoiser)
        if self.schedule.layer_names != self._layer_names:
            raise SignatureMismatchError(
                f"the schedule was made for the layers {', '.join(self.schedule.layer_names)}, but those that can be "
                f"cached here are {', '.join(self._layer_names)}. Run scripts/calibrate.py with the layers of this run."
            )
        self._table = self.schedule.compute.tolist()

    def on_evaluation_start(self, context: StepContext) -> None:
        self._evaluation = context.evaluation
        self._row = self._table[context.evaluation]
        self._memories = self._branches.setdefault(context.branch, {})

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._row = None

    def on_run_end(self) -> None:
        self._reset()
