"""Channels of audio: as many as are wanted, what becomes of any other number, and middle and side in their place."""

import math

import numpy as np
import torch
from torch import Tensor

from foley.core.logs import get_logger
from foley.core.rates import FloatArray

DOWNMIXES = ("mean", "loudest", "refuse")
"""How channels become one: their mean, the one of them with the most energy, or not at all."""
SILENCE_PEAK = 1e-5
"""A clip whose largest sample is below this (-100 dB of full scale) counts as silent."""
_CANCELLED = 0.1  # of the power that the mean of unrelated channels has
_EQUAL = 0.98  # of a power: a tenth of a decibel
_NAMED = 5
_log = get_logger(__name__)


class ChannelsError(ValueError):
    """Several channels where one is wanted, and where they are not to be mixed."""


def channels_of(sounding: object) -> int:
    """Channels of the audio of a codec, or of every clip of a source: `audio_channels`, or 1 where it has none."""
    return int(getattr(sounding, "audio_channels", 1))


def check_downmix(downmix: str) -> str:
    """`downmix` itself; raises ValueError where it is none of `DOWNMIXES`."""
    if downmix not in DOWNMIXES:
        raise ValueError(f"downmix must be one of {', '.join(DOWNMIXES)}, got {downmix!r}")
    return downmix


def mix_down(samples: FloatArray, downmix: str = "mean") -> FloatArray:
    """`[T, channels]` to `[T]`, as `downmix` out of `DOWNMIXES` says; raises ValueError for any other.

    Raises ChannelsError for several channels where that is "refuse".

    >>> wave = np.array([0.5, -0.5], np.float32)
    >>> antiphase = np.stack([wave, -wave], axis=1)
    >>> mix_down(antiphase), mix_down(antiphase, "loudest")
    (array([0., 0.], dtype=float32), array([ 0.5, -0.5], dtype=float32))
    """
    if check_downmix(downmix) == "refuse" and samples.shape[1] > 1:
        raise ChannelsError(
            f"holds {samples.shape[1]} channels, and downmix=refuse mixes none; downmix=mean and downmix=loudest do"
        )
    if downmix == "loudest":
        powers = _powers(samples)
        # The first of those that are equal but for rounding, as the two of a stereo pair in antiphase are.
        return samples[:, int((powers >= _EQUAL * powers.max()).argmax())]
    mono: FloatArray = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return mono


def fit_channels(samples: FloatArray, channels: int = 1, downmix: str = "mean") -> FloatArray:
    """`[T, any number]` to `[T]`, or to `[channels, T]` where several are wanted.

    Several are kept where there are as many as that. Of any other number one is made, as by `mix_down`, which raises
    what it does, and this is what all channels are: a mono recording is the same on both sides.

    >>> fit_channels(np.zeros((8, 2), np.float32)).shape, fit_channels(np.zeros((8, 1), np.float32), channels=2).shape
    ((8,), (2, 8))
    """
    if channels > 1 and samples.shape[1] == channels:
        return np.ascontiguousarray(samples.T)
    mono = mix_down(samples, downmix)
    return mono if channels == 1 else np.tile(mono, (channels, 1))


def to_mid_side(audio: Tensor) -> Tensor:
    """Left and right `[..., 2, T]` to middle and side, half their sum and half their difference.

    >>> to_mid_side(torch.tensor([[1.0], [0.0]])), to_left_right(to_mid_side(torch.tensor([[1.0], [0.0]])))
    (tensor([[0.5000],
            [0.5000]]), tensor([[1.],
            [0.]]))
    """
    left, right = audio.unbind(-2)
    return torch.stack([left + right, left - right], -2) / 2


def to_left_right(audio: Tensor) -> Tensor:
    """What `to_mid_side` was given `[..., 2, T]`: the sum of middle and side, and their difference."""
    middle, side = audio.unbind(-2)
    return torch.stack([middle + side, middle - side], -2)


def first_heard(samples: FloatArray, count: int) -> FloatArray:
    """The first `count` channels of `[T, channels]`; the loudest alone where these are silent and it is not."""
    first, loudest = samples[:, :count], mix_down(samples, "loudest")[:, None]
    return loudest if np.abs(first).max() < SILENCE_PEAK <= np.abs(loudest).max() else first


def loss_of_mean(samples: FloatArray) -> str | None:
    """What the mean of `[T, channels]` loses, in words: channels cancel out, or half of them are silent; else None.

    Unrelated channels are the measure of cancellation: their mean has the sum of their powers over the square of their
    number.
    """
    channels = samples.shape[1]
    powers, mean_power = _powers(samples), _powers(mix_down(samples)[:, None])[0]
    if channels == 1 or powers.max() < SILENCE_PEAK**2:
        return None
    below = f"{10 * math.log10(powers.max() / max(mean_power, SILENCE_PEAK**2)):.0f} dB below the loudest"
    if mean_power < _CANCELLED * powers.sum() / channels**2:
        return f"its {channels} channels cancel out, and their mean is {below}"
    silent = int((np.abs(samples).max(axis=0) < SILENCE_PEAK).sum())
    if 2 * silent >= channels:
        return f"{silent} of its {channels} channels are silent, and the mean of all is {below}"
    return None


def _powers(samples: FloatArray) -> FloatArray:
    powers: FloatArray = np.square(samples).mean(axis=0)
    return powers


class LossyMixes:
    """Recordings whose mean lost sound: the first few are named as they come, and all are counted."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, name: str, samples: FloatArray) -> None:
        """Look at the recording `[T, channels]` called `name`."""
        loss = loss_of_mean(samples)
        if loss is None:
            return
        self.count += 1
        if self.count <= _NAMED:
            _log.warning("%s: %s; downmix=loudest keeps that one", name, loss)
        elif self.count == _NAMED + 1:
            _log.warning("there are more recordings whose mean loses sound: these are only counted")

    def report(self) -> int:
        """Say how many there were, and begin to count anew; returns their number."""
        count, self.count = self.count, 0
        if count:
            _log.warning("the mean of the channels loses sound in %d recordings; downmix=loudest keeps it", count)
        return count


lossy_mixes = LossyMixes()
"""Those that this process has read."""


class DoubledRecordings:
    """Mono recordings where several channels are wanted: the first is named, and all are counted."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, name: str, channels: int) -> None:
        """Say of the first, called `name`, that it is the same in all `channels`."""
        self.count += 1
        if self.count == 1:
            _log.warning("%s is mono: each of %d channels is the same, as of others like it", name, channels)


doubled_recordings = DoubledRecordings()
"""Those that this process has read."""
