"""The 1-D convolutional encoder and decoder of Make-An-Audio 2, whose channels are mel bands rather than a picture."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

_NORM_EPSILON = 1e-6
_DECODER_KERNEL = 3


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
        self.shortcut = _same(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C_in, F]` to `[B, C_out, F]`."""
        return self.shortcut(signal) + self.layers(signal)


class SelfAttention(nn.Module):
    """`x + output(attention(norm(x)))` over frames, with one head."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.query_key_value = _same(channels, 3 * channels, 1)
        self.output = _same(channels, channels, 1)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, F]` to `[B, C, F]`."""
        query, key, value = self.query_key_value(self.norm(signal)).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        attended = scaled_dot_product_attention(query, key, value)
        return signal + self.output(attended[:, 0].transpose(1, 2))


class Downsample(nn.Module):
    """A convolution that halves an even number of frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, F]` to `[B, C, F / 2]`."""
        return self.conv(pad(signal, (0, 1)))


class Upsample(nn.Module):
    """Each frame twice, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _same(channels, channels, 3)

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, F]` to `[B, C, 2 F]`."""
        return self.conv(interpolate(signal, scale_factor=2.0))


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


def _blocks(in_channels: int, out_channels: int, count: int, kernel: int, norm_groups: int) -> list[nn.Module]:
    widths = [in_channels, *[out_channels] * count]
    return [ResidualBlock(*pair, kernel, norm_groups) for pair in pairwise(widths)]


def _middle(channels: int, kernel: int, norm_groups: int) -> list[nn.Module]:
    before, after = _blocks(channels, channels, 2, kernel, norm_groups)
    return [before, SelfAttention(channels, norm_groups), after]


def _head(in_channels: int, out_channels: int, kernel: int, norm_groups: int) -> list[nn.Module]:
    return [_norm(in_channels, norm_groups), nn.SiLU(), _same(in_channels, out_channels, kernel)]


def _norm(channels: int, norm_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups, channels, eps=_NORM_EPSILON)


def _same(in_channels: int, out_channels: int, kernel: int) -> nn.Conv1d:
    return nn.Conv1d(in_channels, out_channels, kernel, padding=kernel // 2)
