"""What accelerators that draw at random share: they know the evaluation, and derive their draws from it alone."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from foley.accel.attention.sparse import pays
from foley.core.locks import RunThread
from foley.core.numbers import SEED
from foley.core.seeding import torch_generator
from foley.diffusion.context import RunContext, StepContext


class SeededAccelerator:
    """Draws depend on the seed, the layer and the evaluation; so both guidance branches and all devices share them."""

    changes_cost = True
    """Layers do less work than their own forwards, and not by a schedule; see `foley.accel.cost.CostMeter`."""

    def __init__(self, seed: int, fallback: bool = False) -> None:
        SEED.check("seed", seed)
        self._seed = seed
        self._fallback = fallback
        self._is_sparse: dict[int, bool] = {}  # of the last run, by the number of tokens
        self._thread = RunThread()
        self._reset()

    def _reset(self) -> None:
        self._num_evaluations = 0
        self._evaluation: int | None = None  # None outside of one
        self._tables: dict[Hashable, Tensor] = {}  # [evaluations, M] for each layer

    def drawn(
        self, layer: str, draw: Callable[..., Tensor], *arguments: float | tuple[int, int], device: torch.device
    ) -> Tensor:
        """`draw(*arguments, generator)` `[M]` for the layer of that name at the present evaluation.

        Drawn for all evaluations of a run at once, and copied to the device once: each copy would wait for it.
        Raises RuntimeError outside of an evaluation, and in another thread than the run's.
        """
        self._thread.check()
        if self._evaluation is None:
            raise RuntimeError(
                f"a {type(self).__name__} is attached, but the sampler does not call it: pass it as a callback"
            )
        key = (layer, arguments, device)
        if key not in self._tables:
            generators = (
                # The class too, so that two accelerators of one seed draw apart.
                torch_generator(type(self).__name__, self._seed, layer, evaluation)
                for evaluation in range(self._num_evaluations)
            )
            # M follows from the arguments alone, so that the draws of all evaluations stack.
            self._tables[key] = torch.stack([draw(*arguments, generator) for generator in generators]).to(device)
        return self._tables[key][self._evaluation]

    def chooses_sparse(self, num_tokens: int, keys_per_query: float, device: torch.device) -> bool:
        """Whether attention over so many tokens is sparse; where it falls back, it is so where that pays."""
        if num_tokens not in self._is_sparse:  # asked in every layer, and told to the user afterwards
            self._is_sparse[num_tokens] = not self._fallback or pays(num_tokens, keys_per_query, device)
        return self._is_sparse[num_tokens]

    def describe(self) -> dict[str, Any]:
        """What the JSON of each clip says: at how many tokens the last run attended densely, being faster so."""
        dense = sorted(tokens for tokens, is_sparse in self._is_sparse.items() if not is_sparse)
        return {"dense_attention_tokens": dense} if dense else {}

    def on_run_start(self, run: RunContext) -> None:
        """Raises RuntimeError while a run of another thread goes on."""
        self._thread.begin()
        self._is_sparse = {}
        self._reset()
        self._num_evaluations = run.num_evaluations

    def on_evaluation_start(self, context: StepContext) -> None:
        self._evaluation = context.evaluation

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._evaluation = None

    def on_run_end(self) -> None:
        if self._thread.is_own():  # not one that was refused
            self._reset()
            self._thread.end()
