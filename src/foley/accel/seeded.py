"""What accelerators that draw at random share: they know the evaluation, and derive their draws from it alone."""

import torch
from torch import Tensor

from foley.diffusion.types import RunContext, StepContext
from foley.seeding import torch_generator


class SeededAccelerator:
    """Draws depend on the seed, the layer and the evaluation; so both guidance branches and all devices share them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._evaluation: int | None = None

    def generator(self, layer: str) -> torch.Generator:
        """For the layer of that name at the present evaluation; raises RuntimeError outside of one."""
        if self._evaluation is None:
            raise RuntimeError(
                f"a {type(self).__name__} is attached, but the sampler does not call it: pass it as a callback"
            )
        return torch_generator(type(self).__name__, self._seed, layer, self._evaluation)

    def on_run_start(self, run: RunContext) -> None:
        self._evaluation = None

    def on_evaluation_start(self, context: StepContext) -> None:
        self._evaluation = context.evaluation

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        self._evaluation = None

    def on_run_end(self) -> None:
        self._evaluation = None
