"""Which prompts lie outside the world that a system was trained on, and which known captions come nearest to them.

Words are what counts: the embeddings of a small text encoder put strangers anywhere, near to everything.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from foley.core.logs import get_logger

_WORDS = (
    "a an the this that these its it is are be being was and or then while with without of in on onto into at to from "
    "by for as after before again first followed same time up down over some someone something very"
)
_FUNCTION_WORDS = frozenset(_WORDS.split())
_SUFFIXES = ("ing", "ed", "es", "s")
_SHOWN = 3
_REMEMBERED = 1000  # prompts
_log = get_logger(__name__)


def stem(word: str) -> str:
    """A word without its ending, so that "barks", "barking" and "bark" are one; crude, but the same for all."""
    for suffix in _SUFFIXES:
        rest = word.removesuffix(suffix)
        if rest != word and len(rest) > 2 and re.search("[aeiouy]", rest) and not word.endswith("ss"):
            word = rest
            break
    return re.sub(r"(.)\1$", r"\1", word.removesuffix("e") if len(word) > 3 else word)


def _words(text: str) -> list[str]:
    """In lower case and in compatibility form (NFKC), as the tokenizer folds them: full-width letters are letters."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def content_stems(text: str) -> frozenset[str]:
    """The stems of the words of `text` that carry meaning.

    >>> content_stems("Ａ ｄｏｇ barks") == content_stems("a dog barking")
    True
    """
    return frozenset(stem(word) for word in _words(text) if word not in _FUNCTION_WORDS)


@dataclass(frozen=True)
class Novelty:
    """How far a prompt lies outside: the share of its meaning that is familiar, and the nearest known captions."""

    familiar_share: float
    nearest: list[str]


class KnownCaptions:
    """The captions that a system knows.

    A word weighs the more the rarer it is in them (inverse document frequency, Spärck Jones 1972), an unknown one most.

    Args:
        captions: distinct captions of the training clips, or the `representative` ones of them.
        required_share: prompts of whose weight a smaller share is known lie outside.
    """

    def __init__(self, captions: Sequence[str], required_share: float = 0.65) -> None:
        self.captions = tuple(captions)
        self.required_share = required_share
        self._stems = [content_stems(caption) for caption in self.captions]
        counts = Counter(stem for stems in self._stems for stem in stems)
        self._weights = {stem: math.log((1 + len(self.captions)) / n) for stem, n in counts.items()}
        self._notes: dict[str, dict[str, Any]] = {}

    def judge(self, prompt: str) -> Novelty | None:
        """None for a familiar prompt, or an empty one, which asks for anything; signs without a word are no caption."""
        stems = content_stems(prompt)
        if not self.captions or not prompt.strip() or (_words(prompt) and not stems):
            return None
        if not stems:
            return Novelty(0.0, self._nearest(prompt, stems))
        share = self._weight(stems & self._weights.keys()) / self._weight(stems)
        return None if share >= self.required_share else Novelty(share, self._nearest(prompt, stems))

    def notes(self, prompt: str) -> dict[str, Any]:
        """What the JSON of a clip says of its prompt: nothing where it is familiar. Warns once of each that is not."""
        if prompt not in self._notes:
            if len(self._notes) >= _REMEMBERED:  # a server hears of prompts without end
                self._notes.clear()
            self._notes[prompt] = _describe(prompt, self.judge(prompt))
        return self._notes[prompt]

    def _weight(self, stems: Iterable[str]) -> float:
        unknown = math.log(1 + len(self.captions))
        return sum(self._weights.get(stem, unknown) for stem in stems)

    def _nearest(self, prompt: str, stems: frozenset[str]) -> list[str]:
        """By the weight that is shared over all weight, and among equals by spelling."""

        def nearness(index: int) -> tuple[float, float]:
            of_either = self._weight(stems | self._stems[index]) or 1.0  # a caption too may hold no word of meaning
            shared = self._weight(stems & self._stems[index]) / of_either
            return shared, SequenceMatcher(None, prompt.lower(), self.captions[index].lower()).ratio()

        return [self.captions[index] for index in sorted(range(len(self.captions)), key=nearness)[: -_SHOWN - 1 : -1]]


def _describe(prompt: str, novelty: Novelty | None) -> dict[str, Any]:
    if novelty is None:
        return {}
    nearest = ", ".join(repr(caption) for caption in novelty.nearest)
    _log.warning("prompt %r lies outside what this system was trained on; nearest known: %s", prompt, nearest)
    return {"outside_training": {"familiar_share": round(novelty.familiar_share, 2), "nearest": novelty.nearest}}


def representative(captions: Iterable[str]) -> list[str]:
    """The shortest of `captions` that hold all of their words, sorted: what a system keeps of its training."""
    kept: list[str] = []
    known: set[str] = set()
    for caption in sorted(set(captions), key=lambda text: (len(text), text)):
        if not (stems := content_stems(caption)) <= known:
            kept.append(caption)
            known |= stems
    return sorted(kept)
