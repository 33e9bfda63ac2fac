"""Recordings of the CPU that keep the contract of CUDA graphs: fixed memory in, fixed memory out, no Python between.

A replay does the recorded operations again, on the tensors of the recording, and nothing else: what Python decided
while recording stays decided. What was computed on the way is spoilt afterwards, as memory that other graphs use.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foley.diffusion.graphs import Replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        if func is not torch.ops.aten._local_scalar_dense.default:  # checks that only the CPU makes
            self.operations.append((func, args, kwargs, result))
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _memory(leaf) not in known]
        self.made += new
        return result


class RecordedGraphs:
    """A `Recorder`; `count` recordings, and `replays` of all of them."""

    def __init__(self, fails: str = "") -> None:
        self.count, self.replays, self.fails = 0, 0, fails

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        if self.fails:
            raise RuntimeError(self.fails)
        self.count += 1
        with _Tape() as tape:
            output = work()
        made = {_memory(tensor) for tensor in tape.made}
        _spoil(tape.made)  # recording computes nothing

        def replay() -> Tensor:
            self.replays += 1
            for func, args, kwargs, recorded in tape.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and _memory(old) in made and _memory(old) != _memory(new):
                        old.copy_(new)
            result = output.clone()
            _spoil(tape.made)
            return output.copy_(result)

        return replay


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
