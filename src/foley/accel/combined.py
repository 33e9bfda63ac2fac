"""No accelerator, and several accelerators as one."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from foley.diffusion.context import Accelerator, RunContext, StepContext, forecast


def decides_by_batch(accelerator: object) -> bool:
    """Whether what is reused follows from a mean over all items, so that an item depends on the rest of its batch.

    >>> from foley.accel import Fora, TeaCache
    >>> decides_by_batch(Fora(interval=2)), decides_by_batch(Combined([Fora(interval=2), TeaCache()]))
    (False, True)
    """
    parts = getattr(accelerator, "accelerators", ())
    return bool(getattr(accelerator, "decides_by_batch", False)) or any(map(decides_by_batch, parts))


class NoAcceleration:
    """The accelerator that changes nothing."""

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        yield

    def graph_pattern(self) -> str:
        return "plain"

    def on_run_start(self, run: RunContext) -> None:
        pass

    def on_evaluation_start(self, context: StepContext) -> None:
        pass

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        pass

    def on_run_end(self) -> None:
        pass


class Combined:
    """Attaches and calls all its accelerators, which must change different things; their order does not matter.

    Example:
        >>> from foley.accel import Combined, Fora, LocalGlobal
        >>> both = Combined.of(cache=Fora(interval=2), attention=LocalGlobal(window_frames=128))
        >>> [type(accelerator).__name__ for accelerator in both.accelerators]
        ['Fora', 'LocalGlobal']
    """

    def __init__(self, accelerators: Sequence[Accelerator]) -> None:
        self.accelerators = tuple(accelerators)  # by this name `calibrated_caches` finds them

    @classmethod
    def of(cls, **accelerators: Accelerator) -> "Combined":
        """Of named ones, so that a config can change one of them (`accel.attention.ratio=0.2`)."""
        return cls(tuple(accelerators.values()))

    @contextmanager
    def attach(self, denoiser: nn.Module) -> Iterator[None]:
        """Attach all of them inside the context; detach those that are attached on any exit, and raise as they do."""
        with ExitStack() as stack:  # detaches from the last to the first
            for accelerator in self.accelerators:
                stack.enter_context(accelerator.attach(denoiser))  # two that replace the same forwards raise here
            yield

    def graph_pattern(self) -> tuple[Hashable, ...] | None:
        """Those of all of them; None where one has none."""
        patterns = [getattr(part, "graph_pattern", lambda: None)() for part in self.accelerators]
        return None if None in patterns else tuple(patterns)

    def on_run_start(self, run: RunContext) -> None:
        for accelerator in self.accelerators:
            accelerator.on_run_start(run)

    def on_evaluation_start(self, context: StepContext) -> None:
        for accelerator in self.accelerators:
            accelerator.on_evaluation_start(context)

    def forecast(self, context: StepContext, noisy: Tensor) -> Tensor | None:
        """That of the one that reuses predictions, if there is one and it does so here."""
        return forecast(self.accelerators, context, noisy)

    def on_evaluation_end(self, context: StepContext, prediction: Tensor) -> None:
        for accelerator in self.accelerators:
            accelerator.on_evaluation_end(context, prediction)

    def on_run_end(self) -> None:
        """Called of each, even if another one's fails."""
        with ExitStack() as stack:  # goes on where a callback raises, and raises in the end
            for accelerator in self.accelerators:
                stack.callback(accelerator.on_run_end)
