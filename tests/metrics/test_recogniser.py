"""The speech recogniser: what it hears in recordings, that clips do not meddle with each other, and what it refuses."""

import sys

import pytest
import torch

from foley.data.audio import read_audio
from foley.metrics.recogniser import RATE_HZ, WordRecogniser

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def recogniser() -> WordRecogniser:
    pytest.importorskip("pocketsphinx")
    return WordRecogniser(DIGITS)


def test_recorded_digits_are_heard_alone_and_after_others(recogniser, shared) -> None:
    clips = [
        torch.from_numpy(read_audio(shared / f"data/fsdd/{place}_theo_{place % 5}.flac", 8000)) for place in range(10)
    ]
    heard = [recogniser.hear(clip, 8000) for clip in clips]
    # It understands 83 % of such digits; by chance alone it would hear one of these ten.
    assert sum(word == digit for word, digit in zip(heard, DIGITS, strict=True)) >= 6
    assert [recogniser.hear(clip, 8000) for clip in reversed(clips)] == heard[::-1]
    assert [recogniser.hear(0.01 * clip, 8000) for clip in clips] == heard


def test_silence_is_no_word(recogniser) -> None:
    assert recogniser.hear(torch.zeros(RATE_HZ), RATE_HZ) is None


def test_words_that_it_does_not_know_are_named(recogniser) -> None:
    with pytest.raises(ValueError, match="words bluub are not in the recogniser's dictionary"):
        WordRecogniser(["one", "bluub"])


def test_without_the_package_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'foley\[judges\]'"):
        WordRecogniser(DIGITS)
