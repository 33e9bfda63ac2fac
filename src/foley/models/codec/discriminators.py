"""The discriminators against which codecs and vocoders are trained.

Each gives a list for every scale: the feature maps of its layers in order, for feature matching, and the logits last.
Those of waveforms judge every channel of audio `[B, A, T]` by itself, as if it were an item: the maps have B A of them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad
from torch.nn.utils.parametrizations import weight_norm


def conv2d(
    in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), dilation: int = 1
) -> nn.Conv2d:
    """A weight-normalised convolution over time and frequency that keeps the size where the stride is 1."""
    padding = (dilation * (kernel[0] - 1) // 2, (kernel[1] - 1) // 2)  # for odd kernels
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel, stride, padding, (dilation, 1)))  # over time alone


def _feature_maps(picture: Tensor, hidden: Iterable[nn.Module], logits: nn.Module, slope: float) -> list[Tensor]:
    """Of a picture `[B, 1 or 2, H, W]`: the output of every hidden layer, leaky ReLU included, and the logits."""
    maps = []
    for layer in hidden:
        picture = leaky_relu(layer(picture), slope)
        maps.append(picture)
    return [*maps, logits(picture)]


# ---------------------------------------------------------------- of waveforms: EnCodec's, the Descript Audio Codec's

_STFT_SLOPE = 0.2  # of leaky ReLUs, EnCodec's
_FREQUENCY_KERNEL = 9  # bins
_TIME_DILATIONS = (1, 2, 4)  # frames between taps, of the three layers in the middle


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
        # Dilated over time and strided over frequency: each layer hears longer, and in coarser bands.
        self.hidden = nn.ModuleList(
            [
                conv2d(2, filters, (3, _FREQUENCY_KERNEL)),
                *(conv2d(filters, filters, (3, _FREQUENCY_KERNEL), (1, 2), dilation) for dilation in _TIME_DILATIONS),
                conv2d(filters, filters, (3, 3)),
            ]
        )
        self.logits = conv2d(filters, 1, (3, 3))

    def forward(self, audio: Tensor) -> list[Tensor]:
        """`[B, A, T]` to feature maps `[B, filters, frames, F]` and logits `[B, 1, frames, F]`."""
        size = len(self.window)
        # In single precision: the transform has no half-precision kernel for these sizes.
        spectrum = torch.stft(
            audio.flatten(0, 1).float(), size, size // 4, window=self.window, normalized=True, return_complex=True
        )
        picture = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, F, frames, 2] to [B, 2, frames, F]
        return _feature_maps(picture, self.hidden, self.logits, _STFT_SLOPE)


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
        """`[B, A, T]` to feature maps, one list per scale."""
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
        # Slow to import, and of no use to the other discriminators.
        from dac.model.discriminator import Discriminator

        self.published = Discriminator(periods=list(periods), fft_sizes=list(fft_sizes), sample_rate=sample_rate_hz)

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """`[B, A, T]` to feature maps, one list per scale."""
        # The package takes one channel: each is an item, [B A, 1, T].
        maps: list[list[Tensor]] = self.published(audio.flatten(0, 1)[:, None])
        return maps


# ---------------------------------------------------------------- of mel spectrograms: PatchGAN

_PATCH_SLOPE = 0.2  # of leaky ReLUs, PatchGAN's
_PATCH_KERNEL = 4
_MOST_WIDENING = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017), weight-normalised: its judgement of a clip depends on no other of the batch.

    Args:
        filters: channels of the first layer; they double from layer to layer, up to eightfold.
        num_layers: layers that halve frequency and time.
    """

    def __init__(self, filters: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        # [1, 64, 128, 256, 512] as published.
        widths = [1, *(filters * min(2**index, _MOST_WIDENING) for index in range(num_layers + 1))]
        strides = [*[2] * num_layers, 1]  # [2, 2, 2, 1]
        self.hidden = nn.ModuleList(map(_patch_conv, widths[:-1], widths[1:], strides))
        self.logits = _patch_conv(widths[-1], 1, 1)

    def forward(self, mel: Tensor) -> list[list[Tensor]]:
        """`[B, mel_bands, F]` to the feature maps of one scale, logits `[B, 1, H, W]` last."""
        return [_feature_maps(mel[:, None], self.hidden, self.logits, _PATCH_SLOPE)]


def _patch_conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    # An even kernel padded by one, as published: it halves an even size, and takes one off at stride 1.
    return weight_norm(nn.Conv2d(in_channels, out_channels, _PATCH_KERNEL, stride, padding=1))


# ---------------------------------------------------------------- of a vocoder's waveforms: HiFi-GAN's, UnivNet's

_JUDGE_SLOPE = 0.1  # of leaky ReLUs, HiFi-GAN's
_PERIOD_WIDENING = (1, 4, 16, 32, 32)  # 32, 128, 512, 1024 and 1024 channels as published
_PERIOD_STRIDES = (3, 3, 3, 3, 1)  # over time
_SPECTRAL_LAYERS = 5


class _Judge(nn.Module):
    """Convolutions with leaky ReLUs between them: every output is a feature map, the last the logits."""

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def judge(self, picture: Tensor) -> list[Tensor]:
        """`[B, 1, H, W]` to feature maps, logits last."""
        *hidden, logits = self.layers
        return _feature_maps(picture, hidden, logits, _JUDGE_SLOPE)


class PeriodDiscriminator(_Judge):
    """Judges every `period`-th sample together (Kong et al. 2020, HiFi-GAN).

    Args:
        period: in samples.
        filters: channels of the first layer; later ones have up to 32 times as many.
    """

    def __init__(self, period: int, filters: int) -> None:
        widths = [1, *(filters * factor for factor in _PERIOD_WIDENING)]
        layers = [
            # Kernels one column wide: samples meet only those of their own phase in the period.
            conv2d(before, after, (5, 1), (stride, 1))
            for before, after, stride in zip(widths[:-1], widths[1:], _PERIOD_STRIDES, strict=True)
        ]
        super().__init__([*layers, conv2d(widths[-1], 1, (3, 1))])
        self.period = period

    def forward(self, audio: Tensor) -> list[Tensor]:
        """`[B, A, T]` to feature maps `[B, channels, frames, period]`, logits last."""
        whole = pad(audio.flatten(0, 1)[:, None], (0, -audio.shape[-1] % self.period), mode="reflect")
        return self.judge(whole.unflatten(-1, (-1, self.period)))  # [B, 1, T / period, period]: a column for each phase


class ResolutionDiscriminator(_Judge):
    """Judges the magnitudes of one spectrogram (Jang et al. 2021, UnivNet).

    Args:
        resolution: transform, hop and window in samples.
        filters: channels of every hidden layer.
    """

    def __init__(self, resolution: tuple[int, int, int], filters: int) -> None:
        # Over frames, whose number each halves.
        middle = [conv2d(filters, filters, (3, 9), (1, 2)) for _ in range(_SPECTRAL_LAYERS - 2)]
        layers = [conv2d(1, filters, (3, 9)), *middle, conv2d(filters, filters, (3, 3))]
        super().__init__([*layers, conv2d(filters, 1, (3, 3))])
        self.resolution = resolution

    def forward(self, audio: Tensor) -> list[Tensor]:
        """`[B, A, T]` to feature maps `[B, filters, F, frames]`, logits `[B, 1, F, frames]` last."""
        fft_size, hop, window = self.resolution
        margin = (fft_size - hop) // 2
        reflected = pad(audio.float().flatten(0, 1), (margin, margin), mode="reflect")  # [B, T + 2 margin]
        ones = torch.ones(window, device=audio.device)  # the published discriminator has no window either
        spectrum = torch.stft(reflected, fft_size, hop, window, ones, center=False, return_complex=True)
        return self.judge(spectrum.abs()[:, None])  # [B, 1, F, frames]


class PeriodResolutionDiscriminator(nn.Module):
    """The multi-period and multi-resolution discriminators of BigVGAN as one.

    Args:
        periods: in samples.
        resolutions: transform, hop and window of each spectrogram, in samples.
        filters: channels of the first layers, 32 as published.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        resolutions: Sequence[Sequence[int]] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)),
        filters: int = 32,
    ) -> None:
        super().__init__()
        by_period = [PeriodDiscriminator(period, filters) for period in periods]
        by_resolution = [ResolutionDiscriminator((fft, hop, window), filters) for fft, hop, window in resolutions]
        self.scales = nn.ModuleList([*by_period, *by_resolution])

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """`[B, A, T]` to feature maps, one list per period and resolution."""
        return [scale(audio) for scale in self.scales]
