"""LayerCache: the one mechanism that executes a cache schedule, whatever policy made it.

What is cached is the output of a self-attention, cross-attention or feed-forward layer, before its gate and residual
(AudioCache, Fig. 2): `x + gate * layer(norm(x))` takes the present `x` and `gate`, and an earlier `layer(norm(x))`.

One evaluation runs like this. The sampler calls `on_evaluation_start`, which looks up the row of the schedule. Then it
calls the denoiser, whose layers have the forwards of `_caching_forward` for now: each either computes and stores, or
recalls. `on_evaluation_end` closes the row, so that a call outside of an evaluation is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from foley.accel.caching.reuse import Hold, HoldInPlace, Reuse, ReuseChoice, Untraced, make_reuse
from foley.accel.caching.schedule import CacheSchedule, Constraints, SignatureMismatchError
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers
from foley.core.hashing import is_compiled
from foley.core.locks import RunThread
from foley.core.numbers import check_choice
from foley.diffusion.context import AXES, RunContext, StepContext

attaching = RLock()
"""Held while forwards are replaced: two threads that look first and then replace would both find nothing."""


class GuardOptions(TypedDict, total=False):
    """Those of `Constraints` that say what computes in any case; caches of blocks take them too."""

    max_reuses: int | None
    warmup: int
    cooldown: int
    always_compute: Sequence[int]


class ConstraintOptions(GuardOptions, total=False):
    """Those of `Constraints`."""

    shared: bool


class CacheOptions(ConstraintOptions, total=False):
    """What every layer cache takes beside its policy's options and `reuse`, see `LayerCache`."""

    axis: str


@dataclass
class _Branch:
    """What a guidance branch has of its own: branches that run one after the other see other inputs."""

    memories: dict[int, Reuse] = field(default_factory=dict)  # by the layer's index
    overdue: set[int] = field(default_factory=set)  # layers that were due at an evaluation that was skipped


class LayerCache:
    """Reuse the outputs of layers where the schedule says so; their norm, modulation and body are then not run.

    Outputs are kept per (branch, layer) for one run. The evaluation comes from the sampler's context; calls are never
    counted. A run that begins in the middle of the schedule computes each layer at its first call, whatever the row
    says. Where whole evaluations are skipped by another accelerator, a layer that was due there is due at the next one.
    Policies are sub-classes that make their schedule in `schedule_for`, once the run is known. After a run `schedule`
    says what was computed.

    Args:
        schedule: what is computed in the one kind of run it was made for; policies give none.
        reuse: what stands in for a layer that is not computed, see `foley.accel.caching.reuse`: "hold", "taylor" or
            "taylor2", or another `Reuse`.
        axis: what extrapolations are polynomials in, see `RunContext.axis`.
        constraints: see `Constraints`; a schedule that does not meet them computes more.

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

    def __init__(
        self,
        schedule: CacheSchedule | None = None,
        reuse: ReuseChoice = Hold,
        axis: str = "timestep",
        **constraints: Unpack[ConstraintOptions],
    ) -> None:
        check_choice("accel.axis", axis, AXES)
        self.schedule = schedule
        self.constraints = Constraints(**constraints)
        self._given = schedule
        self._axis = axis
        self._make_reuse = make_reuse(reuse)
        self._denoiser: nn.Module | None = None  # while attached
        self._layer_names: tuple[str, ...] = ()
        self._thread = RunThread()
        self._reset()

    def _reset(self) -> None:
        self._reuse = self._make_reuse  # of this run
        self._places: list[float] = []  # of the evaluations, along the axis
        self._table: list[list[bool]] = []  # [evaluations][layers]
        self._executed: list[list[bool]] = []  # the same, with what was computed indeed where an evaluation has run
        self._row: list[bool] | None = None  # of the present evaluation; None outside of one
        self._place = 0.0
        self._is_evaluated = False  # whether the denoiser was called, or a recording of it replayed
        self._branches: dict[str, _Branch] = {}
        self._branch = _Branch()  # the present one

    def schedule_for(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """What is computed in this run: the given schedule, once it has been checked. Policies override this.

        Raises:
            ValueError: there is no schedule.
            SignatureMismatchError: it was made for another run.
        """
        if self._given is None:
            raise ValueError(f"{type(self).__name__} has no schedule: give it one, or take a policy such as AudioCache")
        self._given.check(run, denoiser)
        return self._given

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Replace the forwards of the denoiser's cacheable layers inside the context, and restore them on any exit.

        Raises:
            ValueError: the denoiser has no cacheable layer.
            RuntimeError: an accelerator is attached to it already, or this one to another denoiser.
        """
        with ExitStack() as stack:
            with attaching:
                if self._denoiser is not None and self._denoiser is not denoiser:
                    raise RuntimeError("this accelerator is attached to another denoiser; give each of them its own")
                layers = find_cacheable_layers(denoiser)
                forwards = replaced_forwards(denoiser, layers, self._caching_forward, self._skipping_norm)
                stack.enter_context(forwards)
                self._denoiser, self._layer_names = denoiser, tuple(layer.name for layer in layers)
            stack.callback(self._detach)
            yield

    def _detach(self) -> None:
        self._denoiser = None
        self._reset()
        self._thread.end()

    def _caching_forward(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._thread.check()
            if self._row is None:
                raise RuntimeError("a LayerCache is attached, but the sampler does not call it: pass it as a callback")
            self._is_evaluated = True
            memories = self._branch.memories
            if not self._row[index]:
                return memories[index].recall(self._place)
            output = original(*args, **kwargs)
            if index not in memories:
                memories[index] = self._reuse()  # one for each layer and branch
            memories[index].store(self._place, output)
            return output

        return forward

    def _skipping_norm(self, index: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._thread.check()
            if self._row is not None and not self._row[index]:
                return _inputs(args, kwargs)  # of the right shape, and of no use to the layer, which is reused
            return original(*args, **kwargs)

        return forward

    def on_run_start(self, run: RunContext) -> None:
        """Clear the cache and decide on the schedule.

        Raises:
            RuntimeError: nothing is attached, or another thread generates.
            ValueError: a constraint names an evaluation that this run does not have.
            SignatureMismatchError: the schedule was made for another model or other layers of it, another solver or
                number of steps.
        """
        if self._denoiser is None:
            raise RuntimeError("LayerCache has no denoiser: generate inside its `attach(denoiser)` context")
        self._thread.begin()
        self._reset()
        self.constraints.check(run.num_evaluations)
        self.schedule = self.schedule_for(run, self._denoiser)
        # The table's columns are found by position, so order counts as well.
        if self.schedule.layer_names != self._layer_names:
            raise SignatureMismatchError(
                f"the schedule was made for the layers {', '.join(self.schedule.layer_names)}, but those that can be "
                f"cached here are {', '.join(self._layer_names)}. Run scripts/calibrate.py with the layers of this run."
            )
        self.schedule = self.schedule.having(self.constraints.enforced(self.schedule.compute))
        self._table = self.schedule.compute.tolist()  # once: to read a tensor entry by entry is slow
        self._executed = list(self._table)
        self._places = run.axis(self._axis)
        if run.is_recorded and self._make_reuse is Hold:
            self._reuse = HoldInPlace
        if is_compiled(self._denoiser):
            self._reuse = partial(Untraced, self._reuse)

    def graph_pattern(self) -> tuple[bool, ...] | None:
        """Which layers compute at the present evaluation; None where what is reused depends on its place."""
        # Who asks runs or replays the evaluation; layers are not called by a replay.
        self._is_evaluated = True
        return None if self._row is None or self._make_reuse is not Hold else tuple(self._row)

    def on_evaluation_start(self, context: StepContext) -> None:
        self._thread.check()
        self._place = self._places[context.evaluation]
        self._branch = branch = self._branches.setdefault(context.branch, _Branch())
        # A layer without memory computes, whatever the schedule says: the run began in the middle.
        self._row = [
            computes or index in branch.overdue or index not in branch.memories
            for index, computes in enumerate(self._table[context.evaluation])
        ]
        self._is_evaluated = False

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if not self._thread.is_own() or self._row is None:
            return
        due = {index for index, computes in enumerate(self._row) if computes}
        # Another accelerator may skip an evaluation as a whole: what was due there is due at the next one.
        self._branch.overdue = set() if self._is_evaluated else due
        self._executed[context.evaluation] = self._row if self._is_evaluated else [False] * len(self._row)
        self._row = None

    def on_run_end(self) -> None:
        """`schedule` is what was computed, from now on."""
        if not self._thread.is_own():
            return  # that of another thread goes on; this one was refused
        if self._executed and self.schedule is not None:
            self.schedule = self.schedule.having(torch.tensor(self._executed))
        self._reset()
        self._thread.end()


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
    with ExitStack() as stack:
        with attaching:
            _require_free([(name, module) for name, _, module, _ in replaced])
            stack.enter_context(_uncompiled_around(denoiser, layers))
            # A graph ends before what decides anew at each evaluation, and what that calls is compiled for itself: so
            # the number of graphs depends neither on the steps nor on the schedule.
            outside: Callable[[Forward], Forward] = (
                partial(torch.compiler.disable, recursive=False) if is_compiled(denoiser) else lambda forward: forward
            )
            for _, index, module, make in replaced:
                stack.callback(vars(module).pop, "forward", None)  # that of the class shows again
                module.forward = outside(make(index, getattr(module, "compiled_forward", module.forward)))
        yield


def _require_free(modules: Sequence[tuple[str, nn.Module]]) -> None:
    # A forward of its class does not show among the module's own attributes; a replaced one does.
    taken = [name for name, module in modules if "forward" in vars(module)]
    if taken:
        raise RuntimeError(
            f"the forward of {taken[0]!r} ({len(taken)} of {len(modules)} modules) is replaced already: "
            "an accelerator is attached to this denoiser; leave its `attach` context first"
        )


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
