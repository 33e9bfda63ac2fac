"""LayerCache: the one mechanism that executes a cache schedule, whatever policy made it.

What is cached is the output of a self-attention, cross-attention or feed-forward layer, before its gate and residual
(AudioCache, Fig. 2): `x + gate * layer(norm(x))` takes the present `x` and `gate`, and an earlier `layer(norm(x))`.

One evaluation runs like this. The sampler calls `on_evaluation_start`, which looks up the row of the schedule. Then it
calls the denoiser, whose layers have the forwards of `_caching_forward` for now: each either computes and stores, or
recalls. `on_evaluation_end` closes the row, so that a call outside of an evaluation is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foley.accel.caching.schedule import CacheSchedule, SignatureMismatchError
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers
from foley.core.hashing import is_compiled
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

    output: Any = None  # of the layer, [B, N, D]

    def store(self, evaluation: int, output: Any) -> None:
        self.output = output

    def recall(self, evaluation: int) -> Any:
        return self.output


class HoldInPlace(Hold):
    """The same in memory that stays where it is, as recordings of evaluations want it (`foley.diffusion.graphs`)."""

    def store(self, evaluation: int, output: Tensor) -> None:
        if self.output is None:
            self.output = output.clone()
        else:
            self.output.copy_(output)


@dataclass
class Taylor:
    """The line through the last two computed outputs; the last output until there are two.

    The first-order forecast of TaylorSeer (Liu et al. 2025), `F(e) = F(e1) + (e - e1) (F(e1) - F(e0)) / (e1 - e0)`; its
    variable is the evaluation here. Keeps two outputs where `Hold` keeps one.
    """

    evaluation: int = 0  # e1
    output: Any = None  # F(e1)
    slope: Any = None  # (F(e1) - F(e0)) / (e1 - e0)

    def store(self, evaluation: int, output: Any) -> None:
        # F(e1) is still the one before: it is about to become F(e0).
        if self.output is not None:
            self.slope = (output - self.output) / (evaluation - self.evaluation)
        self.evaluation, self.output = evaluation, output

    def recall(self, evaluation: int) -> Any:
        if self.slope is None:
            return self.output  # one output so far: hold it
        return self.output + (evaluation - self.evaluation) * self.slope  # F(e)


class Each:
    """The memories of a layer that returns several tensors, one for each; what is no tensor is held."""

    def __init__(self, make: Callable[[], Reuse], output: Sequence[Any]) -> None:
        self._memories = [make() if isinstance(part, Tensor) else Hold() for part in output]
        self._kind = type(output)

    def store(self, evaluation: int, output: Sequence[Any]) -> None:
        for memory, part in zip(self._memories, output, strict=True):
            memory.store(evaluation, part)

    def recall(self, evaluation: int) -> Any:
        return self._kind(memory.recall(evaluation) for memory in self._memories)  # type: ignore[call-arg]


class Untraced:
    """A memory inside a compiled model, whose own arithmetic no graph takes in: its numbers differ at each step."""

    def __init__(self, make: Callable[[], Reuse]) -> None:
        memory = make()
        self.store = torch.compiler.disable(memory.store)
        self.recall = torch.compiler.disable(memory.recall)


def memory_for(output: Any, make: Callable[[], Reuse]) -> Reuse:
    """What `make` makes, and for a layer that returns several tensors (joint attention) one for each of them.

    >>> memory = memory_for((torch.ones(1), torch.zeros(1)), Hold)
    >>> memory.store(0, (torch.ones(1), torch.zeros(1)))
    >>> memory.recall(1)
    (tensor([1.]), tensor([0.]))
    """
    return Each(make, output) if isinstance(output, tuple | list) else make()


_REUSES: dict[str, type[Reuse]] = {"hold": Hold, "taylor": Taylor}


def reuse_by_name(name: str) -> type[Reuse]:
    """ "hold" or "taylor"; raises ValueError for any other name."""
    if name not in _REUSES:
        raise ValueError(f"accel.reuse must be one of {', '.join(_REUSES)}, got {name!r}")
    return _REUSES[name]


class LayerCache:
    """Reuse the outputs of layers where the schedule says so; their norm, modulation and body are then not run.

    Outputs are kept per (branch, layer) for one run. The evaluation comes from the sampler's context; calls are never
    counted. A run that begins in the middle of the schedule computes each layer at its first call, whatever the row
    says. Policies are sub-classes that make their schedule in `schedule_for`, once the run is known.

    Args:
        schedule: what is computed in the one kind of run it was made for; policies give none.
        reuse: makes what stands in for a layer that is not computed.

    Example:
        Every layer of a small transformer computes at evaluations 0 and 1 of four, and is reused at the other two.

        >>> import torch
        >>> from foley.accel.caching.schedule import CacheSchedule, RunSignature
        >>> from foley.accel.layers import find_cacheable_layers
        >>> from foley.models.dit.model import DiffusionTransformer
        >>> from foley.nn.adaln import AdaLNSola
        >>> denoiser = DiffusionTransformer(4, 16, 2, 2, 8, AdaLNSola(rank=2, alpha=2)).eval()
        >>> run = RunContext("ddim", 4, torch.tensor([999, 749, 499, 249]), 1.0, 0.0, batch_size=1)

        >>> kinds = {layer.name: layer.kind for layer in find_cacheable_layers(denoiser)}
        >>> rows = dict.fromkeys(kinds, [True, True, False, False])
        >>> schedule = CacheSchedule.from_rows(rows, kinds, RunSignature.of(run, denoiser), {"name": "by hand"})

        Inside `attach` the sampler calls the cache; here we do so ourselves.

        >>> noisy, text = torch.randn(1, 4, 20), torch.randn(1, 3, 8)
        >>> calls = []
        >>> hook = denoiser.mid_block.feed_forward.layer.register_forward_hook(lambda *_: calls.append(evaluation))
        >>> cache = LayerCache(schedule)
        >>> with torch.no_grad(), cache.attach(denoiser):
        ...     cache.on_run_start(run)
        ...     for evaluation, timestep in enumerate(run.timesteps):
        ...         context = StepContext(evaluation, timestep, run)
        ...         cache.on_evaluation_start(context)
        ...         prediction = denoiser(noisy, timestep[None], text)
        ...         cache.on_evaluation_end(context, prediction)
        ...     cache.on_run_end()
        >>> calls
        [0, 1]
    """

    def __init__(self, schedule: CacheSchedule | None = None, reuse: Callable[[], Reuse] = Hold) -> None:
        self.schedule = schedule
        self._make_reuse = reuse
        self._denoiser: nn.Module | None = None  # while attached
        self._layer_names: tuple[str, ...] = ()
        self._reset()

    def _reset(self) -> None:
        self._reuse = self._make_reuse  # of this run
        self._table: list[list[bool]] = []  # [evaluations][layers]
        self._row: Sequence[bool] | None = None  # of the present evaluation; None outside of one
        self._evaluation = 0
        # Branches that run one after the other see other inputs: each has memories of its own, by the layer's index.
        self._branches: dict[str, dict[int, Reuse]] = {}
        self._memories: dict[int, Reuse] = {}  # of the present branch

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """What is computed in this run: the given schedule, once it has been checked. Policies override this.

        Raises:
            ValueError: there is no schedule.
            SignatureMismatchError: it was made for another run.
        """
        if self.schedule is None:
            raise ValueError(f"{type(self).__name__} has no schedule: give it one, or take a policy such as AudioCache")
        self.schedule.check(run, denoiser)
        return self.schedule

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Replace the forwards of the denoiser's cacheable layers inside the context, and restore them on any exit.

        Raises:
            ValueError: the denoiser has no cacheable layer.
            RuntimeError: an accelerator is attached to it already, or this one to another denoiser.
        """
        if self._denoiser is not None and self._denoiser is not denoiser:
            raise RuntimeError("this accelerator is attached to another denoiser; give each of them its own")
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
            # A layer without memory computes, whatever the row says: the run began in the middle of the schedule.
            if memory is not None and not self._row[index]:
                return memory.recall(self._evaluation)
            output = original(*args, **kwargs)
            if memory is None:
                memory = self._memories[index] = memory_for(output, self._reuse)  # one for each layer and branch
            memory.store(self._evaluation, output)
            return output

        return forward

    def _skipping_norm(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._row is not None and index in self._memories and not self._row[index]:
                return _inputs(args, kwargs)  # of the right shape, and of no use to the layer, which is reused
            return original(*args, **kwargs)

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
        self.schedule = self.schedule_for(run, self._denoiser)
        # The table's columns are found by position, so order counts as well.
        if self.schedule.layer_names != self._layer_names:
            raise SignatureMismatchError(
                f"the schedule was made for the layers {', '.join(self.schedule.layer_names)}, but those that can be "
                f"cached here are {', '.join(self._layer_names)}. Run scripts/calibrate.py with the layers of this run."
            )
        self._table = self.schedule.compute.tolist()  # once: to read a tensor entry by entry is slow

        if run.is_recorded and self._make_reuse is Hold:
            self._reuse = HoldInPlace
        if is_compiled(self._denoiser):
            self._reuse = partial(Untraced, self._reuse)

    def graph_pattern(self) -> tuple[bool, ...] | None:
        """Which layers compute at the present evaluation; None where what is reused depends on its number."""
        if self._row is None or self._make_reuse is not Hold:
            return None
        return tuple(computes or index not in self._memories for index, computes in enumerate(self._row))

    def on_evaluation_start(self, context: StepContext) -> None:
        self._evaluation = context.evaluation
        self._row = self._table[context.evaluation]
        self._memories = self._branches.setdefault(context.branch, {})

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._row = None

    def on_run_end(self) -> None:
        self._reset()


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module was given, for what it returns: the latent's tokens, and the text's where it has both."""
    hidden, context = next(iter((*args, *kwargs.values()))), kwargs.get("encoder_hidden_states")
    return hidden if context is None else (hidden, context)


@contextmanager
def replaced_forwards(
    denoiser: nn.Module,
    layers: Sequence[CacheableLayer],
    wrap: Callable[[int, Forward], Forward],
    wrap_norm: Callable[[int, Forward], Forward] | None = None,
) -> Iterator[None]:
    """Give layer `i` the forward `wrap(i, its own forward)` inside the context, and its own again on any exit.

    `wrap_norm` does the same for the norms and parts outside of layers. Where blocks are compiled (`compile_blocks`),
    each layer is compiled for itself inside the context.

    Raises:
        RuntimeError: a forward is replaced already; stacked caches would hide each other's calls.
    """
    replaced = [(layer.name, index, layer.module, wrap) for index, layer in enumerate(layers)]
    if wrap_norm is not None:
        feeders = [(layer.name, index, module) for index, layer in enumerate(layers) for module in layer.feeders]
        # They have the index of their layer, whose row decides for all.
        replaced += [(f"what feeds {name}", index, module, wrap_norm) for name, index, module in feeders]
    # A forward of its class does not show among the module's own attributes; a replaced one does.
    taken = [name for name, _, module, _ in replaced if "forward" in vars(module)]
    if taken:
        raise RuntimeError(
            f"the forward of {taken[0]!r} ({len(taken)} of {len(replaced)} modules) is replaced already: "
            "an accelerator is attached to this denoiser; leave its `attach` context first"
        )
    with ExitStack() as stack:
        stack.enter_context(_uncompiled_around(denoiser, layers))
        # A graph ends before what decides anew at each evaluation, and what that calls is compiled for itself: so the
        # number of graphs depends neither on the steps nor on the schedule.
        outside = (
            partial(torch.compiler.disable, recursive=False) if is_compiled(denoiser) else (lambda forward: forward)
        )
        for _, index, module, make in replaced:
            stack.callback(vars(module).pop, "forward", None)  # that of the class shows again
            module.forward = outside(make(index, getattr(module, "compiled_forward", module.forward)))
        yield


@contextmanager
def _uncompiled_around(denoiser: nn.Module, layers: Sequence[CacheableLayer]) -> Iterator[None]:
    """What is compiled around layers that have a `compiled_forward` of their own runs as it is inside the context.

    What replaces a forward decides anew for each layer and evaluation; a graph around it would be compiled for each.
    """
    with ExitStack() as stack:
        if all(hasattr(layer.module, "compiled_forward") for layer in layers):
            for module in [module for module in denoiser.modules() if module._compiled_call_impl is not None]:
                stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
        yield
