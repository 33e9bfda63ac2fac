"""BigVGAN (Lee et al. 2023): a vocoder of anti-aliased periodic activations.

    mel [B, bands, F] -> stem -> stages: (stride up, mean over AMP blocks of kernels 3, 7, 11) -> Snake -> head -> audio

Snake's sin^2 makes harmonics of what it hears, above half the sample rate too, where they would fold back as noise. So
every Snake runs at twice the rate between two low-pass filters: read `AntiAliasedSnake` first.
"""

import math
from collections.abc import Iterable, Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv_transpose1d, pad

from foley.models.codec.mel_vae import MelSpectrogram
from foley.nn.conv import BRANCH_GAIN, HEAD_GAIN, Snake, in_single_precision, same_conv, up_conv

_EDGE_KERNEL = 7  # of the first and the last convolution
_RATIO = 2  # the rate of a Snake over that of its signal
_TAPS = 6 * _RATIO
_TRANSITION = 0.6 / _RATIO  # half the width of the transition band, in units of the higher sample rate


def low_pass_filter() -> Tensor:
    """The filter `[12]` of ratio 2: a sinc with its cutoff at a quarter of the rate under a Kaiser window.

    The window follows Kaiser's formulas for the attenuation that twelve taps reach (BigVGAN, section 3.2; the taps and
    the transition of the published models). It passes a constant as it is.
    """
    # Kaiser: n taps with a transition of delta radians reach A = 2.285 (n - 1) delta + 7.95 decibels; here n is half of
    # the taps, and delta is 4 pi times the half-width, as published.
    attenuation = 2.285 * (_TAPS // 2 - 1) * math.pi * 4 * _TRANSITION + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # for more than 50 dB
    window = torch.kaiser_window(_TAPS, periodic=False, beta=beta)
    taps = window * torch.sinc((torch.arange(_TAPS) - (_TAPS - 1) / 2) / _RATIO)
    return taps / taps.sum()  # a gain of one at zero Hz


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
    # Zeros between samples, then the low-pass; times the ratio, since half of what it averages is zero.
    margin = _TAPS // _RATIO - 1  # samples held at each end, of which the filter's tails are cut off again
    held = pad(signal, (margin, margin), mode="replicate")
    spread = conv_transpose1d(held, _RATIO * low_pass, stride=_RATIO, groups=signal.shape[1])
    cut = margin * _RATIO + (_TAPS - _RATIO) // 2
    return spread[..., cut:-cut]


def downsample(signal: Tensor, low_pass: Tensor) -> Tensor:
    """`[B, C, 2 T]` to `[B, C, T]` with the filter `[C, 1, 12]`; the ends are held."""
    held = pad(signal, (_TAPS // 2 - 1, _TAPS // 2), mode="replicate")
    return conv1d(held, low_pass, stride=_RATIO, groups=signal.shape[1])


class AMPUnit(nn.Module):
    """`x + conv(snake(x))` with a dilated convolution; with `num_convs` 2, a snake and a plain one after it."""

    def __init__(self, channels: int, kernel: int, dilation: int, num_convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_convs):  # the first is dilated, the last small at the start
            gain = BRANCH_GAIN if index == num_convs - 1 else 1.0
            conv = same_conv(channels, channels, kernel, dilation if index == 0 else 1, gain=gain)
            layers += [AntiAliasedSnake(channels), conv]
        self.layers = nn.Sequential(*layers)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        return signal + self.layers(signal)

    @property
    def reach(self) -> int:
        """Samples before and after a sample that its output depends on."""
        convs = [layer for layer in self.layers if isinstance(layer, nn.Conv1d)]
        return sum(int(conv.padding[0]) + AntiAliasedSnake.reach for conv in convs)


class BigVGANStage(nn.Module):
    """A transposed convolution, then the mean over AMP blocks: anti-aliased multi-periodicity, one block a kernel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        kernels: Sequence[int],
        dilations: Sequence[int],
        convs_per_unit: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.resample = up_conv(in_channels, out_channels, stride)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(AMPUnit(out_channels, kernel, dilation, convs_per_unit) for dilation in dilations))
            for kernel in kernels
        )

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C_in, T]` to `[B, C_out, T * stride]`."""
        signal = self.resample(signal)
        return torch.stack([block(signal) for block in self.blocks]).mean(0)  # [kernels, B, C_out, T * stride]

    @property
    def reach(self) -> int:
        """Samples after the transposed convolution, before and after a sample, that its output depends on."""
        return max(sum(unit.reach for unit in block) for block in self.blocks)  # type: ignore[attr-defined, union-attr]


class BigVGAN(nn.Module):
    """Universal vocoder with anti-aliased periodic activations (Lee et al. 2023).

    Args:
        spectrogram: the mel spectrogram it inverts.
        channels: width at the mel rate; every stage halves it.
        strides: up-sampling of each stage; their product is the spectrogram's hop.
        kernels: of the AMP blocks of each stage.
        dilations: of the units of each block.
        convs_per_unit: 2 in AMP blocks of type 1, 1 in those of type 2.
        final_bias: whether the last convolution has a bias.
        final_tanh: bound the audio by a tanh, or else by clipping.

    Raises:
        ValueError: where the strides do not multiply to the hop, or one is below 2.

    Example:
        >>> mel = MelSpectrogram(sample_rate_hz=16000, mel_bands=16, window_samples=256, hop_samples=64)
        >>> vocoder = BigVGAN(mel, channels=16, strides=(8, 8), kernels=(3,), dilations=(1,))
        >>> vocoder(mel(torch.randn(1, 1, 1280))).shape
        torch.Size([1, 1, 1280])
    """

    def __init__(
        self,
        spectrogram: MelSpectrogram,
        channels: int = 1536,
        strides: Sequence[int] = (4, 4, 2, 2, 2, 2),
        kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[int] = (1, 3, 5),
        convs_per_unit: int = 2,
        final_bias: bool = True,
        final_tanh: bool = True,
    ) -> None:
        super().__init__()
        if prod(strides) != spectrogram.hop_samples:
            raise ValueError(f"strides {list(strides)} must multiply to the hop of {spectrogram.hop_samples} samples")
        widths = [channels // 2**index for index in range(len(strides) + 1)]  # C, C / 2, C / 4, ...
        self.spectrogram = spectrogram
        self.final_tanh = final_tanh
        self.stem = same_conv(spectrogram.mel_bands, channels, _EDGE_KERNEL)
        self.stages = nn.Sequential(
            *(
                BigVGANStage(before, after, stride, kernels, dilations, convs_per_unit)
                for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
            )
        )
        self.activation = AntiAliasedSnake(widths[-1])
        self.head = same_conv(widths[-1], 1, _EDGE_KERNEL, bias=final_bias, gain=HEAD_GAIN)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel spectrogram `[B, mel_bands, F]` to audio `[B, 1, F * hop]` within [-1, 1]."""
        audio = in_single_precision(self.head, self.activation(self.stages(self.stem(mel))))
        return audio.tanh() if self.final_tanh else audio.clamp(-1.0, 1.0)

    @property
    def context_frames(self) -> int:
        """How many mel frames before a frame, and after it, its audio hears at most."""
        # From the audio back to the mel: at each stage so many samples more, then a stride-th of them, and one for the
        # transposed convolution's overlap.
        reach = _EDGE_KERNEL // 2 + AntiAliasedSnake.reach
        for stage in cast(Iterable[BigVGANStage], reversed(self.stages)):
            reach = -(-(reach + stage.reach) // stage.stride) + 1
        return reach + _EDGE_KERNEL // 2
