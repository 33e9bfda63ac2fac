"""A judge that others made: which of a few words a speech recogniser hears in a clip.

The extractors of this project learnt from sounds such as it makes. PocketSphinx (Huggins-Daines et al. 2006; BSD
licence) did not: its acoustic model of American English comes with its wheel, and knows sentences recorded at 16 kHz.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from foley.core.rates import resample
from foley.core.seeding import numpy_generator

RATE_HZ = 16000
"""Of the acoustic model. What was recorded at 8 kHz has nothing above 4 kHz here, and is understood less well."""

PEAK = 0.5
"""To which each clip is brought."""

QUIET_SECONDS = 0.25
"""Before and after each clip: the recogniser takes its measure of the background there."""

NOISE = 1e-3
"""Deviation of the noise over all of it, as of a room: the model has never met digital silence."""


class WordRecogniser:
    """Decides for one of `words`, each as likely as the others: its grammar knows nothing else.

    Args:
        words: in small letters, of the recogniser's dictionary.

    Raises ModuleNotFoundError without the package, and ValueError for a word that its dictionary lacks.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._decoder = _pocketsphinx().Decoder(samprate=RATE_HZ, lm=None, loglevel="FATAL")
        if unknown := [word for word in words if self._decoder.lookup_word(word) is None]:
            raise ValueError(f"words {', '.join(unknown)} are not in the recogniser's dictionary; leave them out")
        self._decoder.add_jsgf_string("word", f"#JSGF V1.0; grammar words; public <word> = {' | '.join(words)};")
        self._decoder.activate_search("word")

    def hear(self, audio: Tensor, sample_rate_hz: int) -> str | None:
        """The word in `audio [T]`; None where it hears none."""
        self._decoder.start_utt()
        self._decoder.process_raw(_as_recorded(audio, sample_rate_hz).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return None if found is None else found.hypstr or None


def _pocketsphinx() -> ModuleType:
    """Imported where it is used: an extra, of 28 MB."""
    try:
        import pocketsphinx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a recogniser of words wants {error.name}: pip install 'foley[judges]'") from error
    return pocketsphinx  # type: ignore[no-any-return]


def _as_recorded(audio: Tensor, sample_rate_hz: int) -> np.ndarray:
    """`audio [T]` as 16 bits at the model's rate, levelled, with quiet around it and the same noise each time."""
    levelled = PEAK * audio / audio.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    quiet = round(QUIET_SECONDS * RATE_HZ)
    samples = np.pad(resample(levelled.float().cpu().numpy(), sample_rate_hz, RATE_HZ), quiet)
    noise = NOISE * numpy_generator("recogniser_noise", len(samples)).standard_normal(len(samples))
    return ((samples + noise).clip(-1, 1) * np.iinfo(np.int16).max).astype(np.int16)
