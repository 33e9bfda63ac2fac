"""From stored audio to what an extractor takes: channels, level, rate and length, a class for each extractor.

Half of the disagreements between published numbers come from here, so each class states what it does and everything
is fixed: nothing is cropped at random, and a clip's input never depends on the clips beside it.
"""

from collections.abc import Callable
from typing import ClassVar

import soxr
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchaudio.functional import resample as sinc_resample

from foley.core.channels import first_heard
from foley.core.rates import resample
from foley.metrics.extractors import vggish
from foley.metrics.extractors.clap import split_windows
from foley.metrics.extractors.openl3 import OpenL3
from foley.metrics.extractors.passt import WINDOW_SAMPLES as PASST_WINDOW_SAMPLES

Resampler = Callable[[Tensor, int, int], Tensor]

PEAK = 10 ** (-1 / 20)
"""stable-audio-metrics brings every clip to a peak of -1 dBFS."""


def _polyphase(audio: Tensor, from_hz: int, to_hz: int) -> Tensor:
    return torch.stack([torch.from_numpy(resample(channel.numpy(), from_hz, to_hz)) for channel in audio])


def _soxr(audio: Tensor, from_hz: int, to_hz: int) -> Tensor:
    return torch.from_numpy(soxr.resample(audio.T.numpy(), from_hz, to_hz, "HQ")).T


def _sinc(audio: Tensor, from_hz: int, to_hz: int) -> Tensor:
    return sinc_resample(audio, from_hz, to_hz)


def _kaiser_best(audio: Tensor, from_hz: int, to_hz: int) -> Tensor:
    return sinc_resample(audio, from_hz, to_hz, 64, 0.9475937167399596, "sinc_interp_kaiser", 14.769656459379492)


RESAMPLERS: dict[str, Resampler] = {
    "polyphase, Kaiser beta 8, 16 zero crossings (foley.resampling)": _polyphase,
    "sinc, Hann, width 6, rolloff 0.99 (torchaudio default)": _sinc,
    "sinc, Kaiser beta 14.77, width 64, rolloff 0.948 (resampy kaiser_best, by torchaudio)": _kaiser_best,
    "soxr HQ (librosa and stable-audio-metrics)": _soxr,
}
"""By the name that reports state. A name is part of a protocol's identity, and so of its cache: it never changes."""

_POLYPHASE, _SINC, _KAISER_BEST, _SOXR = RESAMPLERS


class Preprocessing:
    """`audio [channels, T]` at any rate to an extractor's input; subclasses say how, and state it.

    Example:
        >>> PannsPreprocessing()(torch.randn(2, 44100), from_hz=44100).shape  # 1 s, padded to 2 s at 16 kHz
        torch.Size([32000])
    """

    sample_rate_hz: ClassVar[int]
    through_hz: ClassVar[int | None] = None
    """A rate to which audio is brought first, so that the extractor hears nothing above half of it."""
    channels: ClassVar[int] = 1
    channel_rule: ClassVar[str] = "mean of all"
    level: ClassVar[str] = "as stored"
    resampler: ClassVar[str]
    length: ClassVar[str]

    def __call__(self, audio: Tensor, from_hz: int) -> Tensor:
        """The input for one clip; `audio [channels, T]`, not empty and finite."""
        converted = self.normalise(self.mix(audio))
        for to_hz in filter(None, (self.through_hz, self.sample_rate_hz)):
            if from_hz != to_hz:
                converted = RESAMPLERS[self.resampler](converted, from_hz, to_hz)
            from_hz = to_hz
        return self.frame(converted)

    def mix(self, audio: Tensor) -> Tensor:
        """The channels that the extractor takes, `[channels, T]`."""
        return audio.mean(dim=0, keepdim=True)

    def normalise(self, audio: Tensor) -> Tensor:
        """`audio` at the level that the extractor expects."""
        return audio

    def frame(self, audio: Tensor) -> Tensor:
        """`audio [channels, T]` at `sample_rate_hz`, padded and cut as the extractor takes it."""
        raise NotImplementedError

    def describe(self) -> dict[str, str | int]:
        """What a report states."""
        return {
            "sample_rate_hz": self.sample_rate_hz,
            # Absent where there is none: features that were cached before there was one stay valid.
            **({} if self.through_hz is None else {"through_hz": self.through_hz}),
            "channels": self.channels,
            "channel_rule": self.channel_rule,
            "level": self.level,
            "resampler": self.resampler,
            "padding": self.length,
        }


class EmbeddedPreprocessing(Preprocessing):
    """24 kHz mono, as our own clips are."""

    sample_rate_hz = 24000
    resampler = _POLYPHASE
    length = "zeros at the end to a multiple of 1 s, at least 2 s"

    def frame(self, audio: Tensor) -> Tensor:
        seconds = max(-(-audio.shape[1] // self.sample_rate_hz), 2)
        return pad_to(audio[0], seconds * self.sample_rate_hz)


class PannsPreprocessing(Preprocessing):
    """As the WaveDataset of AudioLDM-eval: first channel, mean removed. Silence in one never stands for the others."""

    sample_rate_hz = 16000
    channel_rule = "the first; the loudest where it is silent"
    level = "mean removed before resampling"
    resampler = _SINC
    length = "zeros at the end to at least 2 s"

    def mix(self, audio: Tensor) -> Tensor:
        return _first_heard(audio, 1)

    def normalise(self, audio: Tensor) -> Tensor:
        return audio - audio.mean()

    def frame(self, audio: Tensor) -> Tensor:
        return pad_to(audio[0], 2 * self.sample_rate_hz)


class VggishPreprocessing(Preprocessing):
    """As the FAD of AudioLDM-eval; resampy's best filter is rebuilt with torchaudio."""

    sample_rate_hz = 16000
    resampler = _KAISER_BEST
    length = "zeros at the end to at least one example of 0.96 s; what is over after the last whole one is dropped"

    def frame(self, audio: Tensor) -> Tensor:
        return pad_to(audio[0], vggish.WINDOW_SAMPLES + (vggish.FRAMES - 1) * vggish.HOP_SAMPLES)


class OpenL3Preprocessing(Preprocessing):
    """As stable-audio-metrics: 44.1 kHz stereo, which OpenL3 then takes at 48 kHz in windows of 1 s."""

    sample_rate_hz = 44100
    channels = 2
    channel_rule = "the first two, or the loudest where they are silent; a single one is doubled"
    level = "peak at -1 dBFS before resampling"
    resampler = _SOXR
    length = (
        "to 48 kHz (resampy kaiser_best), half a second of zeros in front, then windows of 1 s every 0.5 s, "
        "the last one zero-padded"
    )

    def mix(self, audio: Tensor) -> Tensor:
        return _first_heard(audio, 2).expand(2, -1)

    def normalise(self, audio: Tensor) -> Tensor:
        return at_peak(audio)

    def frame(self, audio: Tensor) -> Tensor:
        window, hop = OpenL3.window_samples, OpenL3.window_hop_samples
        centred = pad(_kaiser_best(audio, self.sample_rate_hz, OpenL3.sample_rate_hz), (window // 2, 0))
        hops = max(-(-(centred.shape[1] - window) // hop), 0)
        return pad_to(centred, window + hops * hop)


class PasstPreprocessing(Preprocessing):
    """As stable-audio-metrics: 32 kHz mono in windows of 10 s every 5 s."""

    sample_rate_hz = 32000
    level = "peak at -1 dBFS after resampling"
    resampler = _SOXR
    length = "windows of 10 s every 5 s that begin at least 5 s before the end, zero-padded to 10 s"

    def frame(self, audio: Tensor) -> Tensor:
        window, hop = PASST_WINDOW_SAMPLES, PASST_WINDOW_SAMPLES // 2
        starts = range(0, max(hop, audio.shape[1] - hop), hop)
        return pad_to(at_peak(audio)[0], starts[-1] + window).unfold(0, window, hop)


class ClapPreprocessing(Preprocessing):
    """48 kHz mono in windows of 10 s; see `split_windows`."""

    sample_rate_hz = 48000
    resampler = _SOXR
    length = (
        "repeated whole times and zero-padded to 10 s; longer clips in adjoining windows of 10 s, the last moved back"
    )

    def frame(self, audio: Tensor) -> Tensor:
        return split_windows(audio[0], 10 * self.sample_rate_hz)


class Clap16kHzPreprocessing(ClapPreprocessing):
    """The same of audio that was brought to 16 kHz first (EzAudio, section III-A): CLAP hears nothing above 8 kHz."""

    through_hz = 16000


class PeakClapPreprocessing(ClapPreprocessing):
    """The same at the level of stable-audio-metrics."""

    level = "peak at -1 dBFS after resampling"

    def frame(self, audio: Tensor) -> Tensor:
        return super().frame(at_peak(audio))


def _first_heard(audio: Tensor, count: int) -> Tensor:
    """`audio` itself where it has no channel too many."""
    return audio if len(audio) == 1 else torch.from_numpy(first_heard(audio.T.numpy(), count)).T


def pad_to(audio: Tensor, samples: int) -> Tensor:
    """`audio [..., T]` with zeros at the end up to `samples`; longer audio as it is."""
    return pad(audio, (0, max(samples - audio.shape[-1], 0)))


def at_peak(audio: Tensor) -> Tensor:
    """`audio` scaled to `PEAK`; silence as it is."""
    peak = audio.abs().max()
    return audio * (PEAK / peak) if peak > 0 else audio
