"""BigVGAN's discriminators: the waveform folded by periods, and magnitudes of spectra at several resolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad

from foley.models.vae.discriminator import conv2d

_SLOPE = 0.1
_PERIOD_WIDENING = (1, 4, 16, 32, 32)
_SPECTRAL_LAYERS = 5


class _Judge(nn.Module):
    """Convolutions with leaky ReLUs between them: every output is a feature map, the last the logits."""

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def judge(self, picture: Tensor) -> list[Tensor]:
        """`[B, 1, H, W]` to feature maps, logits last."""
        *hidden, logits = self.layers
        signal, maps = picture, []
        for layer in hidden:
            signal = leaky_relu(layer(signal), _SLOPE)
            maps.append(signal)
        return [*maps, logits(signal)]


class PeriodDiscriminator(_Judge):
    """Judges every `period`-th sample together (Kong et al. 2020, HiFi-GAN).

    Args:
        period: in samples.
        filters: channels of the first layer; later ones have up to 32 times as many.
    """

    def __init__(self, period: int, filters: int) -> None:
        widths = [1, *(filters * factor for factor in _PERIOD_WIDENING)]
        strides = [3, 3, 3, 3, 1]
        layers = [
            conv2d(before, after, (5, 1), (stride, 1))
            for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        ]
        super().__init__([*layers, conv2d(widths[-1], 1, (3, 1))])
        self.period = period

    def forward(self, audio: Tensor) -> list[Tensor]:
        """`[B, 1, T]` to feature maps `[B, channels, frames, period]`, logits last."""
        whole = pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect")
        return self.judge(whole.unflatten(-1, (-1, self.period)))


class ResolutionDiscriminator(_Judge):
    """Judges the magnitudes of one spectrogram (Jang et al. 2021, UnivNet).

    Args:
        resolution: transform, hop and window in samples.
        filters: channels of every hidden layer.
    """

    def __init__(self, resolution: tuple[int, int, int], filters: int) -> None:
        middle = [conv2d(filters, filters, (3, 9), (1, 2)) for _ in range(_SPECTRAL_LAYERS - 2)]
        layers = [conv2d(1, filters, (3, 9)), *middle, conv2d(filters, filters, (3, 3))]
        super().__init__([*layers, conv2d(filters, 1, (3, 3))])
        self.resolution = resolution

    def forward(self, audio: Tensor) -> list[Tensor]:
        """`[B, 1, T]` to feature maps `[B, filters, F, frames]`, logits `[B, 1, F, frames]` last."""
        fft_size, hop, window = self.resolution
        margin = (fft_size - hop) // 2
        reflected = pad(audio.float(), (margin, margin), mode="reflect")[:, 0]
        ones = torch.ones(window, device=audio.device)  # the published discriminator has no window either
        spectrum = torch.stft(reflected, fft_size, hop, window, ones, center=False, return_complex=True)
        return self.judge(spectrum.abs()[:, None])


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
        """`[B, 1, T]` to feature maps, one list per period and resolution."""
        return [scale(audio) for scale in self.scales]
