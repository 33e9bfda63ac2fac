"""Discriminators of the codec: each maps audio to one list of feature maps per scale, logits last."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

_FREQUENCY_KERNEL = 9
_TIME_DILATIONS = (1, 2, 4)


class STFTDiscriminator(nn.Module):
    """Convolutions over one complex spectrogram, real and imaginary parts as channels (EnCodec, appendix A.2).

    Args:
        fft_size: window length in samples; the hop is a quarter of it.
        filters: channels of every hidden layer.
    """

    window: Tensor

    def __init__(self, fft_size: int, filters: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        self.hidden = nn.ModuleList(
            [
                conv2d(2, filters, (3, _FREQUENCY_KERNEL)),
                *(conv2d(filters, filters, (3, _FREQUENCY_KERNEL), (1, 2), dilation) for dilation in _TIME_DILATIONS),
                conv2d(filters, filters, (3, 3)),
            ]
        )
        self.logits = conv2d(filters, 1, (3, 3))

    def forward(self, audio: Tensor) -> list[Tensor]:
        """`[B, 1, T]` to feature maps `[B, filters, frames, F]` and logits `[B, 1, frames, F]`."""
        size = len(self.window)
        # In single precision: the transform has no half-precision kernel for these sizes.
        spectrum = torch.stft(
            audio.flatten(0, 1).float(), size, size // 4, window=self.window, normalized=True, return_complex=True
        )
        signal = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        maps = []
        for layer in self.hidden:
            signal = leaky_relu(layer(signal), 0.2)
            maps.append(signal)
        return [*maps, self.logits(signal)]


class MultiScaleSTFTDiscriminator(nn.Module):
    """One STFTDiscriminator per window length.

    Args:
        fft_sizes: window lengths in samples.
        filters: channels of the hidden layers, 64 in the published codec.
    """

    def __init__(self, fft_sizes: Sequence[int] = (1280, 640, 320, 160, 80), filters: int = 64) -> None:
        super().__init__()
        self.scales = nn.ModuleList(STFTDiscriminator(size, filters) for size in fft_sizes)

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """`[B, 1, T]` to feature maps, one list per scale."""
        return [scale(audio) for scale in self.scales]


class DACDiscriminator(nn.Module):
    """The multi-period and multi-band discriminator of the Descript Audio Codec (Kumar et al. 2023), as published.

    Args:
        sample_rate_hz: of the audio.
        periods: of the multi-period discriminators, in samples.
        fft_sizes: window lengths of the multi-band spectrogram discriminators.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        fft_sizes: Sequence[int] = (2048, 1024, 512),
    ) -> None:
        super().__init__()
        # Slow to import, and of no use to the other discriminator.
        from dac.model.discriminator import Discriminator

        self.published = Discriminator(periods=list(periods), fft_sizes=list(fft_sizes), sample_rate=sample_rate_hz)

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """`[B, 1, T]` to feature maps, one list per scale."""
        maps: list[list[Tensor]] = self.published(audio)
        return maps


def conv2d(
    in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), dilation: int = 1
) -> nn.Conv2d:
    """A weight-normalised convolution over time and frequency that keeps the size where the stride is 1."""
    padding = (dilation * (kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel, stride, padding, (dilation, 1)))
