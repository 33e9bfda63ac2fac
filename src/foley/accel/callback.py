"""What an accelerator is: something that attaches to a denoiser from outside and follows one generation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor, nn

from foley.diffusion.types import RunContext, SamplerCallback, StepContext


class Accelerator(SamplerCallback, Protocol):
    """A sampler callback that patches a denoiser for as long as its `attach` context is open."""

    def attach(self, denoiser: nn.Module) -> AbstractContextManager[None]: ...


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
