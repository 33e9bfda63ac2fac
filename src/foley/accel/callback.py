"""The plainest `foley.diffusion.types.Accelerator`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from foley.diffusion.types import RunContext, StepContext


class NoAcceleration:
    """The accelerator that changes nothing."""

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        yield

    def on_run_start(self, run: RunContext) -> None:
        pass

    def on_evaluation_start(self, context: StepContext) -> None:
        pass

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        pass

    def on_run_end(self) -> None:
        pass
