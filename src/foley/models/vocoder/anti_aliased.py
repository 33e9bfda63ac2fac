"""Snake at twice the rate, between low-pass filters: the harmonics it makes do not fold back as aliases."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv_transpose1d, pad

from foley.nn.conv import Snake

_RATIO = 2
_TAPS = 6 * _RATIO
_TRANSITION = 0.6 / _RATIO  # half the width of the transition band, in units of the higher sample rate


def low_pass_filter() -> Tensor:
    """The filter `[12]` of ratio 2: a sinc with its cutoff at a quarter of the rate under a Kaiser window.

    The window follows Kaiser's formulas for the attenuation that twelve taps reach (BigVGAN, section 3.2; the taps and
    the transition of the published models). It passes a constant as it is.
    """
    attenuation = 2.285 * (_TAPS // 2 - 1) * math.pi * 4 * _TRANSITION + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # for more than 50 dB
    window = torch.kaiser_window(_TAPS, periodic=False, beta=beta)
    taps = window * torch.sinc((torch.arange(_TAPS) - (_TAPS - 1) / 2) / _RATIO)
    return taps / taps.sum()


class AntiAliasedSnake(nn.Module):
    """Up-sampling by two, Snake, down-sampling by two (BigVGAN, section 3.2); the filter is no part of the state."""

    reach = 5
    """Samples before and after a sample that its output depends on."""

    low_pass: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.snake = Snake(channels)
        with torch.device("cpu"):  # with values even where weights are built without
            self.register_buffer("low_pass", low_pass_filter().repeat(channels, 1, 1), persistent=False)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        return downsample(self.snake(upsample(signal, self.low_pass)), self.low_pass)


def upsample(signal: Tensor, low_pass: Tensor) -> Tensor:
    """`[B, C, T]` to `[B, C, 2 T]` with the filter `[C, 1, 12]`; the ends are held."""
    margin = _TAPS // _RATIO - 1
    held = pad(signal, (margin, margin), mode="replicate")
    spread = conv_transpose1d(held, _RATIO * low_pass, stride=_RATIO, groups=signal.shape[1])
    cut = margin * _RATIO + (_TAPS - _RATIO) // 2
    return spread[..., cut:-cut]


def downsample(signal: Tensor, low_pass: Tensor) -> Tensor:
    """`[B, C, 2 T]` to `[B, C, T]` with the filter `[C, 1, 12]`; the ends are held."""
    held = pad(signal, (_TAPS // 2 - 1, _TAPS // 2), mode="replicate")
    return conv1d(held, low_pass, stride=_RATIO, groups=signal.shape[1])
