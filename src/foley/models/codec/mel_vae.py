"""The 1-D mel VAE of AudioLCM's codec (Liu et al. 2024, Section 4.1): mel spectrogram, autoencoder, VAE.

Mel bands are channels, not a second axis: a sound moved up by an octave is another sound, so nothing is shared across
bands, and the length is free (Huang et al. 2023, Make-An-Audio 2). F mel frames, L = F / prod(strides) latent frames.
Around the latent lie two convolutions of one frame each, which latent diffusion calls those of its quantisation.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from torchaudio.functional import melscale_fbanks

from foley.models.codec.base import INITIAL_SCALE, GaussianPosterior

_SMALLEST_POWER = 1e-9  # keeps the gradient of the magnitude finite
_FLOOR = 1e-5  # of the mel magnitudes, before the logarithm; HiFi-GAN's
_NORM_EPSILON = 1e-6  # of the group norms, latent diffusion's
_DECODER_KERNEL = 3  # frames


class MelSpectrogram(nn.Module):
    """Log of mel-weighted magnitudes: Hann window, Slaney's mel scale and area normalisation, reflected ends.

    One frame for each hop, the first centred half a hop into the audio (Kong et al. 2020, HiFi-GAN). The constants are
    no part of the state dict.

    Args:
        sample_rate_hz: of the audio.
        mel_bands: number of triangular bands.
        window_samples: length of the window and of the transform.
        hop_samples: samples for each frame.
        lowest_hz, highest_hz: edges of the first and the last band; None is half the rate.
        decimal_log: take the logarithm to base 10, as AudioLCM does, instead of the natural one.
    """

    window: Tensor
    bands: Tensor

    def __init__(
        self,
        sample_rate_hz: int = 16000,
        mel_bands: int = 80,
        window_samples: int = 1024,
        hop_samples: int = 256,
        lowest_hz: float = 0.0,
        highest_hz: float | None = None,
        decimal_log: bool = False,
    ) -> None:
        super().__init__()
        highest_hz = sample_rate_hz / 2 if highest_hz is None else highest_hz
        self.sample_rate_hz = sample_rate_hz
        self.mel_bands = mel_bands
        self.hop_samples = hop_samples
        self.decimal_log = decimal_log
        self.settings = (  # what a vocoder must agree in, see `MelCodec`
            *(sample_rate_hz, mel_bands, window_samples, hop_samples),
            *(float(lowest_hz), float(highest_hz), decimal_log),
        )
        with torch.device("cpu"):  # with values even where weights are built without
            bands = melscale_fbanks(
                window_samples // 2 + 1, lowest_hz, highest_hz, mel_bands, sample_rate_hz, "slaney", "slaney"
            )
            self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
            self.register_buffer("bands", bands, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` to `[B, mel_bands, ceil(T / hop)]`, in single precision at least; the end is zero-padded.

        Raises:
            ValueError: where the audio is not mono, or too short to be reflected at its ends.
        """
        if audio.shape[1] != 1:
            raise ValueError(
                f"a mel spectrogram is of mono audio [B, 1, T], got shape {list(audio.shape)}; data.channels=1 mixes it"
            )
        # F frames over T + 2 margin = (F - 1) hop + window samples: frame n is centred on (n + 1/2) hop.
        window_samples, margin = len(self.window), (len(self.window) - self.hop_samples) // 2
        signal = pad(audio[:, 0], (0, -audio.shape[-1] % self.hop_samples))  # [B, T], whole hops
        if signal.shape[-1] <= margin:
            raise ValueError(f"a mel spectrogram needs more than {margin} samples, got {audio.shape[-1]}")
        # Rounding to half precision would be audible after the logarithm.
        with torch.autocast(audio.device.type, enabled=False):
            # [B, T + 2 margin].
            reflected = pad(signal.to(self.window.dtype)[:, None], (margin, margin), mode="reflect")[:, 0]
            spectrum = torch.stft(  # [B, bins, F]
                reflected, window_samples, self.hop_samples, window=self.window, center=False, return_complex=True
            )
            magnitude = (torch.view_as_real(spectrum).square().sum(-1) + _SMALLEST_POWER).sqrt()  # [B, bins, F]
            # [mel_bands, bins] times [B, bins, F]: each band a weighted sum of bins
            mel = (self.bands.T @ magnitude).clamp(min=_FLOOR)
            return mel.log10() if self.decimal_log else mel.log()  # [B, mel_bands, F]


# ---------------------------------------------------------------- the autoencoder's parts


def _norm(channels: int, norm_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups, channels, eps=_NORM_EPSILON)


def _same(in_channels: int, out_channels: int, kernel: int) -> nn.Conv1d:
    """A convolution that keeps the length; `kernel` must be odd."""
    return nn.Conv1d(in_channels, out_channels, kernel, padding=kernel // 2)


class ResidualBlock(nn.Module):
    """`shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))`, keeping the length."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm_groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm(in_channels, norm_groups),
            nn.SiLU(),
            _same(in_channels, out_channels, kernel),
            _norm(out_channels, norm_groups),
            nn.SiLU(),
            _same(out_channels, out_channels, kernel),
        )
        # 1 frame wide, where the width changes.
        self.shortcut = _same(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C_in, F]` to `[B, C_out, F]`."""
        return self.shortcut(signal) + self.layers(signal)


class SelfAttention(nn.Module):
    """`x + output(attention(norm(x)))` over frames, with one head."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.query_key_value = _same(channels, 3 * channels, 1)  # 1 frame wide: of each frame by itself
        self.output = _same(channels, channels, 1)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, F]` to `[B, C, F]`."""
        rows = self.query_key_value(self.norm(signal)).transpose(1, 2)  # [B, F, 3 C]
        query, key, value = rows.unsqueeze(1).chunk(3, dim=-1)  # each [B, 1, F, C], 1 head
        attended = scaled_dot_product_attention(query, key, value)  # [B, 1, F, C]
        return signal + self.output(attended[:, 0].transpose(1, 2))


class Downsample(nn.Module):
    """A convolution that halves an even number of frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, F]` to `[B, C, F / 2]`."""
        return self.conv(pad(signal, (0, 1)))  # zeros at the end alone: (F + 1 - 3) / 2 + 1 = F / 2 for even F


class Upsample(nn.Module):
    """Each frame twice, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _same(channels, channels, 3)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, F]` to `[B, C, 2 F]`."""
        return self.conv(interpolate(signal, scale_factor=2.0))  # copies, [B, C, 2 F]


def _blocks(in_channels: int, out_channels: int, count: int, kernel: int, norm_groups: int) -> list[nn.Module]:
    """Residual blocks, of which the first changes the width."""
    widths = [in_channels, *[out_channels] * count]
    return [ResidualBlock(*pair, kernel, norm_groups) for pair in pairwise(widths)]


def _middle(channels: int, kernel: int, norm_groups: int) -> list[nn.Module]:
    """Attention between two blocks, at the latent's rate: the only layer that hears the whole clip."""
    before, after = _blocks(channels, channels, 2, kernel, norm_groups)
    return [before, SelfAttention(channels, norm_groups), after]


def _head(in_channels: int, out_channels: int, kernel: int, norm_groups: int) -> list[nn.Module]:
    return [_norm(in_channels, norm_groups), nn.SiLU(), _same(in_channels, out_channels, kernel)]


# ---------------------------------------------------------------- encoder and decoder


class MelEncoder(nn.Sequential):
    """Mel spectrogram `[B, mel_bands, F]` to the raw moments of the latent `[B, out_channels, F / prod(strides)]`.

    Args:
        mel_bands: channels of the input.
        widths: channels of each stage.
        strides: 1 or 2 for each stage, at its end.
        num_blocks: residual blocks of each stage.
        out_channels: channels of the output, twice the latent's.
        kernel: frames that a convolution sees.
        norm_groups: of the group norms.
    """

    def __init__(
        self,
        mel_bands: int,
        widths: Sequence[int],
        strides: Sequence[int],
        num_blocks: int,
        out_channels: int,
        kernel: int,
        norm_groups: int,
    ) -> None:
        layers: list[nn.Module] = [_same(mel_bands, widths[0], kernel)]
        # (before, width, stride) of each stage.
        for before, width, stride in zip([widths[0], *widths[:-1]], widths, strides, strict=True):
            layers += _blocks(before, width, num_blocks, kernel, norm_groups)
            layers += [Downsample(width)] if stride == 2 else []
        layers += _middle(widths[-1], kernel, norm_groups)
        super().__init__(*layers, *_head(widths[-1], out_channels, kernel, norm_groups))


class MelDecoder(nn.Sequential):
    """Latent `[B, C, L]` to mel spectrogram `[B, mel_bands, L * prod(strides)]`: the mirror of the encoder.

    Each stage has a block more than the encoder's, and blocks see three frames, as published.

    Args:
        latent_channels: C.
        mel_bands, widths, strides, num_blocks, kernel, norm_groups: as the encoder's, in the encoder's order.
    """

    def __init__(
        self,
        latent_channels: int,
        mel_bands: int,
        widths: Sequence[int],
        strides: Sequence[int],
        num_blocks: int,
        kernel: int,
        norm_groups: int,
    ) -> None:
        up = list(reversed(widths))
        layers: list[nn.Module] = [_same(latent_channels, up[0], kernel), *_middle(up[0], _DECODER_KERNEL, norm_groups)]
        for before, width, stride in zip([up[0], *up[:-1]], up, reversed(strides), strict=True):
            layers += [Upsample(before)] if stride == 2 else []
            layers += _blocks(before, width, num_blocks + 1, _DECODER_KERNEL, norm_groups)
        super().__init__(*layers, *_head(up[-1], mel_bands, kernel, norm_groups))


# ---------------------------------------------------------------- the VAE


class MelVAE(nn.Module):
    """VAE whose channels are mel bands and whose only axis is time (Huang et al. 2023, Make-An-Audio 2).

    Args:
        spectrogram: the mel spectrogram it is for.
        channels: width of the first stage.
        multipliers: width of each stage, in units of `channels`.
        strides: 1 or 2 for each stage; their product is the number of mel frames for each latent frame.
        num_blocks: residual blocks of each stage.
        latent_channels: C.
        kernel: frames that a convolution sees, odd.
        norm_groups: groups of the group norms; divides every width.

    Raises:
        ValueError: where the stages disagree in number, or a stride is neither 1 nor 2.

    Example:
        >>> mel = MelSpectrogram(sample_rate_hz=16000, mel_bands=16, window_samples=256, hop_samples=64)
        >>> mel_vae = MelVAE(mel, channels=8, multipliers=(1,), strides=(2,), latent_channels=4, norm_groups=4)
        >>> frames = mel(torch.randn(1, 1, 1280))
        >>> frames.shape, mel_vae.posterior(frames).mean.shape
        (torch.Size([1, 16, 20]), torch.Size([1, 4, 10]))
    """

    def __init__(
        self,
        spectrogram: MelSpectrogram,
        channels: int = 384,
        multipliers: Sequence[int] = (1, 2, 4),
        strides: Sequence[int] = (2, 1, 1),
        num_blocks: int = 2,
        latent_channels: int = 20,
        kernel: int = 5,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(multipliers) != len(strides) or not set(strides) <= {1, 2}:
            raise ValueError(
                f"multipliers {list(multipliers)} and strides {list(strides)} must have one entry for each stage, "
                "and strides must be 1 or 2"
            )
        self.spectrogram = spectrogram
        self.latent_channels = latent_channels
        self.frames_per_latent = prod(strides)  # mel frames
        mel_bands, widths = spectrogram.mel_bands, [channels * multiplier for multiplier in multipliers]
        self.encoder = MelEncoder(mel_bands, widths, strides, num_blocks, 2 * latent_channels, kernel, norm_groups)
        self.decoder = MelDecoder(latent_channels, mel_bands, widths, strides, num_blocks, kernel, norm_groups)
        self.quantisation = _same(2 * latent_channels, 2 * latent_channels, 1)  # of the raw moments
        self.dequantisation = _same(latent_channels, latent_channels, 1)  # of the latent
        nn.init.constant_(self.quantisation.bias[latent_channels:], INITIAL_SCALE)  # type: ignore[index]

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return self.spectrogram.hop_samples * self.frames_per_latent

    def encode_moments(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, mel_bands, F]`, F a multiple of `frames_per_latent`, to the raw (mean, scale), each `[B, C, L]`."""
        mean, scale = self.quantisation(self.encoder(mel)).float().chunk(2, dim=1)  # [B, 2 C, L]
        return mean, scale

    def posterior(self, mel: Tensor) -> GaussianPosterior:
        """The distribution of the latent given `mel` `[B, mel_bands, F]`."""
        return GaussianPosterior.from_moments(*self.encode_moments(mel))

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, mel_bands, L * frames_per_latent]`."""
        return self.decoder(self.dequantisation(latent))
