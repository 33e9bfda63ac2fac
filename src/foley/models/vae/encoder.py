"""Waveform encoder: residual stages, each followed by a strided convolution (Stable Audio / DAC family)."""

from collections.abc import Sequence

from torch import Tensor, nn

from foley.nn.conv import Snake, down_conv, same_conv

_BRANCH_GAIN = 0.3  # units start near the identity, so that deep stacks keep their variance


class ResidualUnit(nn.Module):
    """`x + conv1(snake(conv7_dilated(snake(x))))`, keeping channels and length."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            same_conv(channels, channels, 7, dilation),
            Snake(channels),
            same_conv(channels, channels, 1, gain=_BRANCH_GAIN),
        )

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        return signal + self.layers(signal)


def residual_units(channels: int, count: int) -> nn.Sequential:
    """`count` residual units with dilations 1, 3, 9, ..."""
    return nn.Sequential(*(ResidualUnit(channels, 3**index) for index in range(count)))


class EncoderStage(nn.Module):
    """Residual units, then Snake and a convolution that divides the length by `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_units: int) -> None:
        super().__init__()
        self.units = residual_units(in_channels, num_units)
        self.activation = Snake(in_channels)
        self.resample = down_conv(in_channels, out_channels, stride)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C_in, T]` to `[B, C_out, T / stride]`."""
        return self.resample(self.activation(self.units(signal)))


class Encoder(nn.Module):
    """Audio to the raw moments of the latent.

    Args:
        widths: channels at the audio rate, then after each stage.
        strides: down-sampling factor of each stage.
        num_units: residual units in each stage.
        out_channels: channels of the output, twice the latent's.
    """

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], num_units: Sequence[int], out_channels: int
    ) -> None:
        super().__init__()
        self.stem = same_conv(1, widths[0], 7)
        self.stages = nn.Sequential(*map(EncoderStage, widths[:-1], widths[1:], strides, num_units))
        self.activation = Snake(widths[-1])
        self.head = same_conv(widths[-1], out_channels, 3)

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` to `[B, out_channels, T / hop]`; T must be a multiple of the hop."""
        return self.head(self.activation(self.stages(self.stem(audio))))
