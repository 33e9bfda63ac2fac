"""What stands in for a layer that is not computed: its last output, or the polynomial through its last ones."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Reuse(Protocol):
    """The memory of one layer and guidance branch during a run.

    `place` is where an evaluation lies along the cache's axis (`RunContext.axis`): steps need not be even, and two
    evaluations of one may lie at the same place.
    """

    def store(self, place: float, output: Any) -> None:
        """Remember what the layer computed at `place`."""

    def recall(self, place: float) -> Any:
        """What to use at a later evaluation; something has been stored."""


@dataclass
class Hold:
    """The last output, as AudioCache and SmoothCache reuse it."""

    output: Any = None  # of the layer, [B, N, D]

    def store(self, place: float, output: Any) -> None:
        self.output = output

    def recall(self, place: float) -> Any:
        return self.output


class HoldInPlace(Hold):
    """The same in memory that stays where it is, as recordings of evaluations want it (`foley.diffusion.graphs`)."""

    def store(self, place: float, output: Any) -> None:
        if self.output is None:
            self.output = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)
        else:
            tree_map(lambda kept, value: kept.copy_(value) if isinstance(kept, Tensor) else kept, self.output, output)


@dataclass
class Taylor:
    """The polynomial of degree `order` through the last `order + 1` computed outputs; of lower degree until there are.

    The forecast of TaylorSeer (Liu et al. 2025), whose derivatives are differences of computed outputs. There steps are
    even; here it is Lagrange's formula, exact for polynomials on any steps: F(x) = sum_j w_j(x) F(x_j). What is
    computed twice at one place, as Heun's solver does, counts as the later one, so that nothing is divided by zero;
    what lies at infinity (the log-SNR of pure noise) is held until there is another. `Hold` keeps one output, this
    `order + 1`.

    >>> memory = Taylor(order=2)
    >>> for place in (0.0, 1.0, 3.0):
    ...     memory.store(place, torch.tensor([place**2]))
    >>> memory.recall(4.0)
    tensor([16.])
    """

    order: int = 1
    nodes: list[tuple[float, Any]] = field(default_factory=list)  # place and output, the newest first

    def store(self, place: float, output: Any) -> None:
        earlier = [node for node in self.nodes if node[0] != place and isfinite(node[0])]
        self.nodes = [(place, output), *earlier][: self.order + 1 if isfinite(place) else 1]

    def recall(self, place: float) -> Any:
        places, outputs = zip(*self.nodes, strict=True)
        return outputs[0] if len(places) == 1 else weighted(lagrange(places, place), *outputs)


def lagrange(nodes: Sequence[float], place: float) -> list[float]:
    """The weight of each node's value in the polynomial through all of them, at `place`; nodes must differ.

    >>> lagrange([0.0, 1.0, 3.0], 4.0)  # x^2 is reproduced: 1 * 0 - 2 * 1 + 2 * 9 = 16
    [1.0, -2.0, 2.0]
    """
    return [prod((place - other) / (node - other) for other in nodes if other != node) for node in nodes]


def weighted(weights: Sequence[float], *outputs: Any) -> Any:
    """The sum of outputs of one form, in the type of each of their tensors; of what is no tensor the first."""
    return tree_map(partial(_weighted, weights), *outputs)


def _weighted(weights: Sequence[float], *values: Any) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    # Weights of alternating signs: half precision would lose what is left of their sum.
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    total = weights[0] * values[0].to(dtype)
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total.add_(value.to(dtype), alpha=weight)
    return total.to(values[0].dtype)


class Untraced:
    """A memory inside a compiled model, whose own arithmetic no graph takes in: its numbers differ at each step."""

    def __init__(self, make: Callable[[], Reuse]) -> None:
        memory = make()
        self.store = torch.compiler.disable(memory.store)
        self.recall = torch.compiler.disable(memory.recall)


REUSES: dict[str, Callable[[], Reuse]] = {"hold": Hold, "taylor": Taylor, "taylor2": partial(Taylor, 2)}
"""By the names of `accel.reuse`; another is given as an object, see `make_reuse`."""

ReuseChoice = str | Reuse | Callable[[], Reuse]
"""A name, a fresh memory that is copied for each layer (`{_target_: ...}` in a config), or what makes one."""


def make_reuse(choice: ReuseChoice) -> Callable[[], Reuse]:
    """What makes the memory of a layer; raises ValueError for an unknown name, and for what is no `Reuse`.

    >>> make_reuse("taylor2")()
    Taylor(order=2, nodes=[])
    >>> make_reuse(Taylor(order=3))()
    Taylor(order=3, nodes=[])
    """
    if isinstance(choice, str):
        if choice not in REUSES:
            raise ValueError(
                f"accel.reuse must be one of {', '.join(REUSES)}, got {choice!r}; or give a class with `store` and "
                "`recall` as {_target_: its.dotted.Name}"
            )
        return REUSES[choice]
    if not isinstance(choice, type) and hasattr(choice, "store") and hasattr(choice, "recall"):
        return partial(deepcopy, choice)
    if not callable(choice):
        raise ValueError(f"accel.reuse={choice!r}: give a name, or an object with `store` and `recall`")
    return choice


def reuse_name(choice: ReuseChoice) -> str:
    """For records.

    >>> reuse_name("hold"), reuse_name(Taylor(order=3)), reuse_name(partial(Taylor, order=3))
    ('hold', 'Taylor', 'Taylor')
    """
    choice = choice.func if isinstance(choice, partial) else choice
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
