"""What stands in for the output of a layer that is not computed: the last one held, or an extrapolation."""

from dataclasses import dataclass
from typing import Any, Protocol


class Reuse(Protocol):
    """The memory of one layer and guidance branch during a run."""

    def store(self, evaluation: int, output: Any) -> None:
        """Remember what the layer computed at `evaluation`."""

    def recall(self, evaluation: int) -> Any:
        """What to use at a later evaluation; something has been stored."""


@dataclass
class Hold:
    """The last output, as AudioCache and SmoothCache reuse it."""

    output: Any = None

    def store(self, evaluation: int, output: Any) -> None:
        self.output = output

    def recall(self, evaluation: int) -> Any:
        return self.output


@dataclass
class Taylor:
    """The line through the last two computed outputs; the last output until there are two.

    The first-order forecast of TaylorSeer (Liu et al. 2025), with the evaluation as its variable. Keeps two outputs
    where `Hold` keeps one.
    """

    evaluation: int = 0
    output: Any = None
    slope: Any = None

    def store(self, evaluation: int, output: Any) -> None:
        if self.output is not None:
            self.slope = (output - self.output) / (evaluation - self.evaluation)
        self.evaluation, self.output = evaluation, output

    def recall(self, evaluation: int) -> Any:
        if self.slope is None:
            return self.output
        return self.output + (evaluation - self.evaluation) * self.slope


_REUSES: dict[str, type[Reuse]] = {"hold": Hold, "taylor": Taylor}


def reuse_by_name(name: str) -> type[Reuse]:
    """ "hold" or "taylor"; raises ValueError for any other name."""
    if name not in _REUSES:
        raise ValueError(f"accel.reuse must be one of {', '.join(_REUSES)}, got {name!r}")
    return _REUSES[name]
