"""Waveform decoder: the mirror of the encoder, with transposed convolutions and no final tanh."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from foley.models.vae.encoder import residual_units
from foley.nn.conv import Snake, in_single_precision, same_conv, up_conv

_HEAD_GAIN = 0.1  # training starts from a quiet output, not from loud noise


class DecoderStage(nn.Module):
    """Snake and a transposed convolution that multiplies the length by `stride`, then residual units."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_units: int) -> None:
        super().__init__()
        self.activation = Snake(in_channels)
        self.resample = up_conv(in_channels, out_channels, stride)
        self.units = residual_units(out_channels, num_units)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C_in, T]` to `[B, C_out, T * stride]`."""
        return self.units(self.resample(self.activation(signal)))


class Decoder(nn.Module):
    """Latent to audio.

    Args:
        in_channels: latent channels C.
        widths, strides, num_units: as the encoder's, in the encoder's order; built here from the last to the first.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], strides: Sequence[int], num_units: Sequence[int]
    ) -> None:
        super().__init__()
        up = list(reversed(widths))
        self.stem = same_conv(in_channels, up[0], 7)
        self.stages = nn.Sequential(*map(DecoderStage, up[:-1], up[1:], reversed(strides), reversed(num_units)))
        self.activation = Snake(up[-1])
        self.head = same_conv(up[-1], 1, 7, bias=False, gain=_HEAD_GAIN)

    def forward(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, 1, L * hop]`."""
        return in_single_precision(self.head, self.activation(self.stages(self.stem(latent))))

    @property
    def context_frames(self) -> int:
        """How many latent frames before a frame, and after it, its audio hears: the receptive field of the layers."""
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)]
        hop = prod(layer.stride[0] for layer in layers)
        first, last = 0, hop - 1
        for layer in reversed(layers):
            first, last = _heard(layer, first, last)
        return max(-first, last)


def _heard(layer: nn.Conv1d | nn.ConvTranspose1d, first: int, last: int) -> tuple[int, int]:
    """The first and the last input of a layer that its outputs `first` to `last` depend on."""
    reach, padding, stride = layer.dilation[0] * (layer.kernel_size[0] - 1), int(layer.padding[0]), layer.stride[0]
    if isinstance(layer, nn.ConvTranspose1d):
        return -((reach - padding - first) // stride), (last + padding) // stride
    return first - padding, last - padding + reach
