"""What an option may be, so that others are refused by name.

`NumberRange` refuses NaN, infinity, text and absurd sizes; `check_choice` what is not among some words.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class NumberRange:
    """Finite numbers between two ends, whole ones where `whole`; true and false are none.

    Args:
        least, most: the ends, which belong to it; None is no end.
        above: an end that does not belong to it.

    >>> NumberRange(above=0).check("duration_seconds", 2.5)
    >>> NumberRange(least=1, most=1000, whole=True).check("steps", 0)
    Traceback (most recent call last):
    ...
    ValueError: steps=0: give a whole number >= 1 and <= 1000
    >>> NumberRange(least=0).check("threshold", float("nan"))
    Traceback (most recent call last):
    ...
    ValueError: threshold=nan: give a number >= 0
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(_as_float(value)):
            return False
        number: Any = value  # Real compares with no float, says its type
        if self.above is not None and number <= self.above:
            return False
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, which names the option and says what it takes, where `value` lies outside."""
        if value not in self:
            raise ValueError(f"{name}={shown(value)}: give {self}")

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        ends = {">": self.above, ">=": self.least, "<=": self.most}
        return f"{kind} " + " and ".join(f"{sign} {end}" for sign, end in ends.items() if end is not None)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf


def shown(value: Any) -> str:
    """In the words of the command line, and short."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError, which names the option and its values, where `value` is none of them.

    >>> check_choice("accel.axis", "index", ("timestep", "angle"))
    Traceback (most recent call last):
    ...
    ValueError: accel.axis must be one of timestep, angle, got 'index'
    """
    if value not in (choices := tuple(known)):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


SEED = NumberRange(least=0, most=2**63 - 1, whole=True)
"""What every generator of random numbers takes, those of other libraries too."""
SHARE = NumberRange(least=0, most=1)
POSITIVE = NumberRange(above=0)
COUNT = NumberRange(least=1, whole=True)
NOT_NEGATIVE = NumberRange(least=0)
SECONDS = NumberRange(least=0, most=1e9)
"""Of sound: far more would be no number of samples."""
