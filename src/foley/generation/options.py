"""What the options of a request may be, known without PyTorch: a slip of the keyboard is answered before it is loaded.

`foley.generation.settings`, the command line and the server all check by these tables.
"""

from collections.abc import Mapping
from typing import Any

from foley.core.numbers import COUNT, NOT_NEGATIVE, POSITIVE, SECONDS, SEED, SHARE, NumberRange

_AUDIBLE = NumberRange(least=1e-4)
# From the gate of BS.1770, below which all is silence, to what the loudest masters reach under their peaks.
_LOUDNESS_LUFS = NumberRange(least=-70, most=-5)
NUMBERS = {
    "duration_seconds": _AUDIBLE,
    "num_steps": NumberRange(least=1, most=100_000, whole=True),
    "eta": SHARE,
    "batch_size": COUNT,
    "window_seconds": _AUDIBLE,
    "overlap_seconds": NOT_NEGATIVE,
    "decode_chunk_seconds": POSITIVE,
    "loudness_lufs": _LOUDNESS_LUFS,
    "fade_seconds": SECONDS,
}
"""What each number of `GenerationSettings` may be; those that a system or nothing may decide can be None too."""
_NEVER_NONE = ("batch_size", "overlap_seconds", "eta", "fade_seconds")

MAX_PROMPT_CHARACTERS = 10_000
MAX_CLIPS = 1_000_000
"""Of one request; more are a slip of the keyboard, and would fill the memory before the first is generated."""

OPTION_NUMBERS = {
    **{"steps" if name == "num_steps" else name: numbers for name, numbers in NUMBERS.items()},
    "seed": SEED,
    "caption_seed": SEED,
    "num": NumberRange(least=1, most=MAX_CLIPS, whole=True),
    "max_duration_seconds": POSITIVE,
    "trained_seconds": POSITIVE,
    "guidance_scale": NOT_NEGATIVE,
    "guidance_rescale": SHARE,
    "strength": SHARE,
    "control_scale": NOT_NEGATIVE,
    **dict.fromkeys(("mask_start_seconds", "mask_length_seconds", "boundary_seconds"), SECONDS),
}
"""What each numeric option may be, of the command line and of requests to the server."""

IDLE = {
    "negative_prompt": "at guidance scale 1",
    "guidance_rescale": "at guidance scale 1",
    "duration_seconds": "with a recording to edit or to vary, which has a length of its own",
    "overlap_seconds": "without window_seconds",
}
"""Options, and when they change nothing."""


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the field, for a number outside `NUMBERS`; takes all of them, by field.

    >>> check_numbers(dict.fromkeys(NUMBERS) | {"batch_size": 8, "eta": 0, "overlap_seconds": -1})
    Traceback (most recent call last):
    ...
    ValueError: overlap_seconds=-1: give a number >= 0
    """
    for name, numbers in NUMBERS.items():
        if values[name] is not None or name in _NEVER_NONE:
            numbers.check(name, values[name])


def check_prompt_length(prompt: str) -> None:
    """Raises ValueError for a prompt that no one can have meant.

    >>> check_prompt_length("a dog barks")
    """
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"a prompt has {len(prompt)} characters ({prompt[:40]!r}...); at most {MAX_PROMPT_CHARACTERS}")
