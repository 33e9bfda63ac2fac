"""What a listener might write under a clip of each class."""

import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from foley.data.procedural.templates import TEMPLATES

_LEVELS = (("faintly", "quietly", "in the distance"), (), ("loudly", "close by"))
SEQUENCE = ("{first}, then {second}", "{first} followed by {second}", "first {first}, and after that {second}")
MIXTURE = ("{first} while {second}", "{first} and {second}", "{first} with {second} at the same time")


def _tidy(text: str) -> str:
    """Close the gaps of empty slots and set "a" or "an" by the letter that follows."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m.group(1) in "aeiou" else "a ", text)


def caption(class_name: str, slots: Mapping[str, tuple[str, ...]], level: float, rng: np.random.Generator) -> str:
    """A random caption that is true of a clip of `class_name`.

    Args:
        slots: adjectives that hold per slot; empty where the parameter is unremarkable.
        level: position of the clip's loudness in its range, in [0, 1].
    """
    words = {name: str(rng.choice(choices)) if choices else "" for name, choices in slots.items()}
    text = str(rng.choice(TEMPLATES[class_name])).format(**words)
    adverbs = _LEVELS[min(int(3 * level), 2)]
    return _tidy(f"{text} {rng.choice(adverbs)}" if adverbs and rng.random() < 0.5 else text)


def combine(captions: tuple[str, str], forms: tuple[str, ...], rng: np.random.Generator) -> str:
    """One caption for two sounds, in one of `forms` (`SEQUENCE` or `MIXTURE`)."""
    return str(rng.choice(forms)).format(first=captions[0], second=captions[1])


@lru_cache
def captions_for(class_name: str) -> list[str]:
    """The canonical captions of a class, all without adjectives; raises KeyError for an unknown class."""
    if class_name not in TEMPLATES:
        raise KeyError(f"unknown sound class {class_name!r}; one of {sorted(TEMPLATES)}")
    empty = {"pitch": "", "rate": "", "density": ""}
    return [_tidy(template.format(**empty)) for template in TEMPLATES[class_name]]
