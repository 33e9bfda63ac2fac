"""BigVGAN: from mel spectrograms to audio."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from foley.models.mel_codec.spectrogram import MelSpectrogram
from foley.models.vocoder.anti_aliased import AntiAliasedSnake
from foley.nn.conv import in_single_precision, same_conv, up_conv

_BRANCH_GAIN = 0.3  # units start near the identity, so that deep stacks keep their variance
_HEAD_GAIN = 0.1  # training starts from a quiet output
_EDGE_KERNEL = 7


class AMPUnit(nn.Module):
    """`x + conv(snake(x))` with a dilated convolution, or with a plain one after it (`num_convs` 2)."""

    def __init__(self, channels: int, kernel: int, dilation: int, num_convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_convs):
            gain = _BRANCH_GAIN if index == num_convs - 1 else 1.0
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
        return torch.stack([block(signal) for block in self.blocks]).mean(0)

    @property
    def reach(self) -> int:
        """Samples after the transposed convolution, before and after a sample, that its output depends on."""
        return max(sum(unit.reach for unit in block) for block in self.blocks)  # type: ignore[attr-defined, union-attr]


class BigVGAN(nn.Module):
    """Universal vocoder with anti-aliased periodic activations (Lee et al. 2023).

    Args:
        spectrogram: the mel spectrogram it inverts.
        channels: width at the mel rate; every stage halves it.
        strides: up-sampling of each stage, even; their product is the spectrogram's hop.
        kernels: of the AMP blocks of each stage.
        dilations: of the units of each block.
        convs_per_unit: 2 in AMP blocks of type 1, 1 in those of type 2.
        final_bias: whether the last convolution has a bias.
        final_tanh: bound the audio by a tanh, or else by clipping.

    Raises:
        ValueError: where the strides do not multiply to the hop, or one is odd.
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
        widths = [channels // 2**index for index in range(len(strides) + 1)]
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
        self.head = same_conv(widths[-1], 1, _EDGE_KERNEL, bias=final_bias, gain=_HEAD_GAIN)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel spectrogram `[B, mel_bands, F]` to audio `[B, 1, F * hop]` within [-1, 1]."""
        audio = in_single_precision(self.head, self.activation(self.stages(self.stem(mel))))
        return audio.tanh() if self.final_tanh else audio.clamp(-1.0, 1.0)

    @property
    def context_frames(self) -> int:
        """How many mel frames before a frame, and after it, its audio hears at most."""
        reach = _EDGE_KERNEL // 2 + AntiAliasedSnake.reach
        for stage in cast(Iterable[BigVGANStage], reversed(self.stages)):
            reach = -(-(reach + stage.reach) // stage.stride) + 1
        return reach + _EDGE_KERNEL // 2
