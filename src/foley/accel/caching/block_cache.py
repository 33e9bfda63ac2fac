"""BlockCache: the residual of a stack of blocks is added in the place of running them, as decided while sampling.

A transformer is a stream `h_0` that N blocks add to, one after the other. The first F and the last B of them always
run; the others, from F to N - B, are the cached stack. What they added when they last ran,

    R = h_{N - B} - h_F

changes little from one evaluation to the next, so `h_F + R` may stand for running them. Where `LayerCache` follows a
schedule that is known beforehand, here a rule looks at the present evaluation, before block F, and decides:

                     rule and signal                                        first, last
    TeaCache         change of the first block's modulated input            0, 0          teacache.py
    FirstBlockCache  change of what the first block adds                    1, 0          first_block_cache.py
    DBCache          change of what the first F blocks add                  F, B          dbcache.py
    MagCache         calibrated change of the magnitude of R, no signal     0, 0          magcache.py

Long skips: an out-block that runs may want the output of an in-block that does not. That output is `h_F` and what the
blocks from F up to that one added when they last ran.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor, nn

from foley.accel.caching.calibration import relative_change
from foley.accel.caching.layer_cache import GuardOptions, attaching, replaced_forwards
from foley.accel.caching.reuse import Reuse, ReuseChoice, make_reuse, reuse_name
from foley.accel.caching.schedule import CacheSchedule, Constraints, RunSignature
from foley.accel.layers import CacheableLayer, Forward, find_cacheable_layers
from foley.core.hashing import plain_name, uncompiled
from foley.core.locks import RunThread
from foley.core.numbers import NumberRange, check_choice
from foley.diffusion.context import AXES, RunContext, StepContext

Streams = tuple[Any, ...]
"""What passes through the stack: the hidden states `[B, N, D]`, and the text's where blocks change it too."""

_STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")  # as diffusers names them
_STREAMS = ("hidden_states", "encoder_hidden_states")
# What a block attends with, below the block: ours, and as the models of diffusers call it.
_ATTENTION = ("self_attention.attention", "attn1", "attn", "self_attn")
_WHOLE = NumberRange(least=0, whole=True)


def find_blocks(denoiser: nn.Module) -> list[CacheableLayer]:
    """The blocks of the denoiser's one stack, in order of execution: its `blocks()`, or else lists named as diffusers'.

    Raises ValueError where there is none: a U-Net has no such stack, since its resolution changes on the way.
    """
    denoiser = uncompiled(denoiser)
    own = getattr(denoiser, "blocks", None)
    if callable(own) and not isinstance(own, nn.Module):
        blocks = list(own())
    else:
        lists = [getattr(denoiser, name, None) for name in _STACKS]
        blocks = [block for found in lists if isinstance(found, nn.ModuleList) for block in found]
    if not blocks:
        raise ValueError(
            f"{type(denoiser).__name__} has no stack of transformer blocks ({', '.join(_STACKS)}), whose residual "
            "could be reused; take a cache of layers, such as accel=fora"
        )
    names = {module: plain_name(name) for name, module in denoiser.named_modules()}
    return [CacheableLayer(names[block], "block", block) for block in blocks]


def read_by_later_blocks(blocks: Sequence[nn.Module], first: int, end: int) -> set[int]:
    """Of the cached stack `[first, end)`, the blocks whose output is read outside of it: the last, and long skips.

    Block i hands its output to block N - 1 - i, where that one joins a skip, as in EzAudio-DiT and Hunyuan-DiT.
    """
    joins = [any(getattr(block, name, None) is not None for name in ("skip", "skip_linear")) for block in blocks]
    partners = {index: len(blocks) - 1 - index for index in range(first, end)}
    # A partner within the stack is skipped with it, and its input with that.
    skips = {index for index, partner in partners.items() if partner >= end and joins[partner]}
    return {end - 1} | skips


class Rule(Protocol):
    """Decides for one branch of one run; asked once at each evaluation, in order."""

    def computes(self, evaluation: int, change: float | None) -> bool:
        """Whether the stack runs; `change` is what was measured, None where there is nothing to compare with."""

    def has_computed(self) -> None:
        """It runs at this evaluation, whoever decided that: what was added up begins anew."""


class BelowThreshold:
    """Reuse while the change since the last computed evaluation is below a threshold.

    >>> rule = BelowThreshold(0.1)
    >>> [rule.computes(0, change) for change in (0.05, 0.1, None)]
    [False, True, True]
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def computes(self, evaluation: int, change: float | None) -> bool:
        return change is None or change >= self._threshold

    def has_computed(self) -> None:
        pass


@dataclass
class Probe:
    """What a rule may look at before the cached stack: `h_0` and `h_F`, each `[B, N, D]`, and on demand the input of
    the next block's attention, as time and norm have modulated it."""

    entered: Tensor
    arrived: Tensor
    modulated: Callable[[], Tensor]


@dataclass
class _Branch:
    """What one branch of guidance keeps during a run."""

    rule: Rule
    entered: Streams = ()  # h_0
    arrived: Streams = ()  # h_F
    computes: bool = True  # at the present evaluation
    reference: Tensor | None = None  # what the next signal is compared with
    last: int | None = None  # the evaluation that computed last
    reused: int = 0  # evaluations in all
    residuals: dict[int, list[Reuse | None]] = field(default_factory=dict)  # of each block read outside, by stream


class _Port:
    """Where a block takes and gives its streams: by position or name, and as a tensor or as a tuple."""

    def __init__(self, block: nn.Module) -> None:
        parameters = list(inspect.signature(type(block).forward).parameters)[1:]  # without self
        names = [name for name in _STREAMS if name in parameters]
        self._names = names if _STREAMS[0] in names else parameters[:1]  # ours calls it x
        self._positions = {name: parameters.index(name) for name in self._names}
        self._block = block
        self.gives_tuple = False  # until an output has been seen

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Streams:
        """The streams among the arguments; None for one that was not given."""
        return tuple(
            kwargs[name] if name in kwargs else args[place] if place < len(args) else None
            for name, place in self._positions.items()
        )

    def taken(self, output: Any) -> Streams:
        """The streams of an output: of a block that gives one tensor, that one."""
        return tuple(output[place] for place in self._order) if isinstance(output, tuple) else (output,)

    def given(self, streams: Streams) -> Any:
        """The output that holds these streams."""
        if not self.gives_tuple:
            return streams[0]
        return tuple(streams[self._order.index(place)] for place in range(len(self._order)))

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """Where each stream stands in a tuple: as diffusers registers it for its blocks, or else in order."""
        from diffusers.hooks._helpers import TransformerBlockRegistry  # where a tuple is returned, it is there

        try:
            known = TransformerBlockRegistry.get(type(self._block))
        except ValueError:
            return tuple(range(len(self._names)))
        places = known.return_hidden_states_index, known.return_encoder_hidden_states_index
        return tuple(place for place in places if place is not None)


class _Reached(Exception):  # noqa: N818
    """No error: carries what a block's attention was called with."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def modulated_input(block: nn.Module, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What the first attention of a block is called with, `[B, N, D]`: normed, and modulated where the time does that.

    The block is run that far and no further, so that this costs its norm and modulation, in any architecture.

    Raises ValueError for a block without attention of a known name.
    """
    modules = dict(block.named_modules())
    attention = next((modules[name] for name in _ATTENTION if name in modules), None)
    if attention is None:
        raise ValueError(f"{type(block).__name__} has no attention called {', '.join(_ATTENTION)}: TeaCache needs one")

    def stop(module: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        raise _Reached(given[0] if given else named[_STREAMS[0]])

    # An exception is the only way out of a forward of any architecture before the rest of it has run.
    hook = attention.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward(*args, **kwargs)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise ValueError(f"{type(block).__name__} did not call its attention: TeaCache cannot look at its input")


class BlockOptions(GuardOptions, total=False):
    """What every cache of blocks takes beside its own options and `reuse`, see `BlockCache`."""

    axis: str


class BlockCache(ABC):
    """Base of the caches of blocks: a sub-class gives a `rule`, and a `signal` where its rule looks at one.

    One decision holds for all items of a batch and both branches of a joint one; branches that run one after the other
    have states of their own. A run begins with nothing in memory, and computes.

    After a run, `schedule` is what was computed, over the cacheable layers (a layer counts as computed where any branch
    did), `differences` what was measured at each evaluation (of several branches the largest; None where nothing was),
    and `hits` how many evaluations reused, of each branch.

    Args:
        policy: name and parameters, as the schedule records them.
        first_blocks, last_blocks: F and B, which always run.
        max_hits: reuses in all, at most; None for no limit.
        reuse: how the residual is reused, see `foley.accel.caching.reuse`.
        axis: what extrapolations are polynomials in, see `RunContext.axis`.
        guards: what computes in any case, see `Constraints`.
    """

    schedule: CacheSchedule | None = None
    decides_by_batch = True  # see `foley.accel.combined.decides_by_batch`
    compares_with_computed = True  # False: the change is that since the evaluation before, computed or not

    def __init__(
        self,
        policy: Mapping[str, Any],
        first_blocks: int = 0,
        last_blocks: int = 0,
        max_hits: int | None = None,
        reuse: ReuseChoice = "hold",
        axis: str = "timestep",
        **guards: Unpack[GuardOptions],
    ) -> None:
        for name, value in (("first_blocks", first_blocks), ("last_blocks", last_blocks), ("max_hits", max_hits or 0)):
            _WHOLE.check(name, value)
        check_choice("accel.axis", axis, AXES)
        self.constraints = Constraints(**guards)
        self._policy = {**policy, "reuse": reuse_name(reuse), **self.constraints.changed()}
        self._first, self._last, self._make_reuse = first_blocks, last_blocks, make_reuse(reuse)
        self._axis, self._max_hits = axis, max_hits
        self._thread = RunThread()
        self.differences: list[float | None] = []
        self.hits = 0
        self._calls = 0  # evaluations, of each branch
        self._denoiser: nn.Module | None = None  # while attached
        self._layers: list[CacheableLayer] = []
        self._blocks: list[CacheableLayer] = []
        self._reset()

    def _reset(self) -> None:
        self._run: RunContext | None = None
        self._context: StepContext | None = None  # of the present evaluation
        self._places: Sequence[float] = ()  # of the evaluations, along the axis of extrapolation
        self._guards = self.constraints  # of this run
        self._branches: dict[str, _Branch] = {}
        self._computed: dict[int, bool] = {}  # of the evaluations that ran

    @abstractmethod
    def rule(self, run: RunContext) -> Rule:
        """A new one for one branch of a run that is about to begin."""

    def signal(self, probe: Probe) -> Tensor | None:
        """`[B, ...]`, whose relative L1 change the rule is told; None for a rule that needs none."""
        return None

    # ---------------------------------------------------------------- attaching

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Replace the forwards of the denoiser's blocks inside the context, and restore them on any exit.

        Raises:
            ValueError: the denoiser has no stack of blocks, or first and last blocks leave none to reuse.
            RuntimeError: a cache of layers or of blocks is attached to it already, or this one anywhere.
        """
        blocks, layers = find_blocks(denoiser), find_cacheable_layers(denoiser)
        if self._first + self._last >= len(blocks):
            raise ValueError(
                f"accel.first_blocks={self._first} and accel.last_blocks={self._last} leave none of the {len(blocks)} "
                f"blocks of {type(denoiser).__name__} to be reused: together they must be fewer"
            )
        with ExitStack() as stack:
            with attaching:
                if self._denoiser is not None:
                    raise RuntimeError("this accelerator is attached to a denoiser already; give each of them its own")
                self._set_stack(blocks)
                # Layers keep their forwards, but are taken: no cache of layers may decide in blocks that do not run.
                stack.enter_context(replaced_forwards(denoiser, layers, lambda _, own: own))
                stack.enter_context(replaced_forwards(denoiser, blocks, self._block_forward))
                self._denoiser, self._layers = denoiser, layers
            stack.callback(self._detach)
            yield

    def _detach(self) -> None:
        self._denoiser = None
        self._reset()
        self._thread.end()

    def _set_stack(self, blocks: list[CacheableLayer]) -> None:
        modules = [block.module for block in blocks]
        self._blocks, self._end = blocks, len(blocks) - self._last
        self._ports = [_Port(module) for module in modules]
        self._kept = read_by_later_blocks(modules, self._first, self._end)

    def _block_forward(self, index: int, original: Forward) -> Forward:
        # They decide anew at each evaluation, and a graph would be compiled for each; the block itself may be compiled.
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (reused := before(index, original, args, kwargs)) is not None:
                return reused
            output = original(*args, **kwargs)
            after(index, output)
            return output

        return forward

    def _before(self, index: int, original: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What stands for the block's output; None where it runs."""
        branch, port = self._present_branch(), self._ports[index]
        if index == 0:  # h_0, from which signals are counted, also where it is not h_F
            branch.entered = port.read(args, kwargs)
        if index == self._first:
            branch.arrived = port.read(args, kwargs)
            self._decide(branch, partial(modulated_input, self._blocks[index].module, original, args, kwargs))
        in_stack = self._first <= index < self._end
        return None if branch.computes or not in_stack else port.given(self._recall(branch, index))

    def _after(self, index: int, output: Any) -> None:
        port = self._ports[index]
        port.gives_tuple = isinstance(output, tuple)
        if index in self._kept:  # to keep every block would be the memory of the whole model
            self._store(self._present_branch(), index, port.taken(output))

    # ---------------------------------------------------------------- deciding

    def _present_branch(self) -> _Branch:
        self._thread.check()
        if self._context is None or self._run is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} is attached, but the sampler does not call it: pass it as a callback")
        if self._context.branch not in self._branches:
            self._branches[self._context.branch] = _Branch(self.rule(self._run))
        return self._branches[self._context.branch]

    def _decide(self, branch: _Branch, look: Callable[[], Tensor]) -> None:
        assert self._context is not None
        evaluation = self._context.evaluation
        signal = self.signal(Probe(branch.entered[0], branch.arrived[0], look))
        change = None
        if signal is not None and branch.reference is not None:
            # Over the size of the earlier one, as these papers have it; to read the number waits for the device.
            change = relative_change(branch.reference, signal).mean().item()
        # The rule is asked always, since it may add up; what must compute does so whatever it says.
        wants = branch.rule.computes(evaluation, change)
        branch.computes = wants or self._must_compute(branch, evaluation)
        if branch.computes:
            branch.rule.has_computed()
        if branch.computes or not self.compares_with_computed:
            branch.reference = signal
        self._count(branch, evaluation, change)

    def _must_compute(self, branch: _Branch, evaluation: int) -> bool:
        assert self._run is not None
        return (
            branch.last is None  # the first of this branch, wherever the run began
            or evaluation >= self._guards.next_due(branch.last, self._run.num_evaluations)
            or (self._max_hits is not None and branch.reused >= self._max_hits)
        )

    def _count(self, branch: _Branch, evaluation: int, change: float | None) -> None:
        reuses = not branch.computes
        # What is due counts from here, also where whole evaluations are skipped by another accelerator in between.
        branch.last = branch.last if reuses else evaluation
        branch.reused += reuses
        self.hits += reuses
        self._calls += 1
        # A schedule has one row for all branches, which is not to promise savings that one of them did not make.
        self._computed[evaluation] = branch.computes or self._computed.get(evaluation, False)
        known = [value for value in (self.differences[evaluation], change) if value is not None]
        self.differences[evaluation] = max(known, default=None)

    # ---------------------------------------------------------------- the residual

    def _store(self, branch: _Branch, index: int, streams: Streams) -> None:
        memories = branch.residuals.get(index)
        if memories is None:
            memories = [None if stream is None else self.memory() for stream in streams]
            branch.residuals[index] = memories
        for memory, stream, arrived in zip(memories, streams, branch.arrived, strict=False):
            if memory is not None and stream is not None:
                memory.store(self._place(), stream - arrived)

    def _recall(self, branch: _Branch, index: int) -> Streams:
        if index not in self._kept:  # nothing outside reads it: the stream passes
            return branch.arrived
        return tuple(
            None if memory is None else arrived + memory.recall(self._place())
            for memory, arrived in zip(branch.residuals[index], branch.arrived, strict=False)
        )

    def memory(self) -> Reuse:
        """What keeps one residual during a run; a recorder gives another."""
        return self._make_reuse()

    def _place(self) -> float:
        assert self._context is not None
        return self._places[self._context.evaluation]

    # ---------------------------------------------------------------- the run

    def on_run_start(self, run: RunContext) -> None:
        """Forget the run before.

        Raises RuntimeError if nothing is attached or another thread generates, ValueError where an evaluation is to
        compute that there is not.
        """
        if self._denoiser is None:
            raise RuntimeError(f"{type(self).__name__} has no denoiser: generate inside its `attach(denoiser)` context")
        self._thread.begin()
        self._reset()
        self.constraints.check(run.num_evaluations)
        self._run, self._places, self._guards = run, run.axis(self._axis), self.guards(run)
        self.schedule, self.differences, self.hits, self._calls = None, [None] * run.num_evaluations, 0, 0

    def guards(self, run: RunContext) -> Constraints:
        """What computes in any case in this run."""
        return self.constraints

    def on_evaluation_start(self, context: StepContext) -> None:
        self._thread.check()
        self._context = context

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        if self._thread.is_own():
            self._context = None

    def on_run_end(self) -> None:
        if not self._thread.is_own():
            return  # that of another thread goes on; this one was refused
        if self._run is not None and self._computed and self._denoiser is not None:
            self.schedule = self._executed(self._run, self._denoiser)
        self._reset()
        self._thread.end()

    def _executed(self, run: RunContext, denoiser: nn.Module) -> CacheSchedule:
        """What was computed; evaluations before the run began count as such, and are no part of its cost."""
        first = min(self._computed)  # later than 0 where an edit or variation begins in the middle
        stack = [
            evaluation < first or self._computed.get(evaluation, False) for evaluation in range(run.num_evaluations)
        ]
        inside = tuple(f"{block.name}." for block in self._blocks[self._first : self._end])
        everywhere = [True] * run.num_evaluations
        rows = {layer.name: stack if layer.name.startswith(inside) else everywhere for layer in self._layers}
        kinds = {layer.name: layer.kind for layer in self._layers}
        return CacheSchedule.from_rows(rows, kinds, RunSignature.of(run, denoiser), self._policy)

    def describe(self) -> dict[str, Any]:
        """What the JSON of each clip says: the policy, and how many evaluations of the last run reused (`hits`)."""
        measured = [value for value in self.differences if value is not None]
        changes = {"mean_difference": sum(measured) / len(measured)} if measured else {}
        return {"cache": {**self._policy, "hits": self.hits, "evaluations": self._calls, **changes}}
