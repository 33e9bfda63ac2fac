"""The waveform VAE of EzAudio (Hai et al. 2024, Section II-A): encoder, decoder, and the codec that they make.

    audio [B, A, T]       -> stem, stages (units, Snake, stride down), Snake, head -> mean and scale, each [B, C, L]
    latent [B, C, L]      -> stem, stages (Snake, stride up, units),   Snake, head -> audio [B, A, L * hop]

A is 1 as published, 2 of stereo, which it may hear and make as middle and side (`foley.core.channels.to_mid_side`).

The blocks are those of the Descript Audio Codec (Kumar et al. 2023), with a Gaussian in the place of its quantiser. All
convolutions keep or exactly divide the length, so frame n of the latent is samples n * hop to (n + 1) * hop.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from foley.core.channels import to_left_right, to_mid_side
from foley.models.codec.base import INITIAL_SCALE, AudioVAE
from foley.nn.conv import (
    BRANCH_GAIN,
    HEAD_GAIN,
    Snake,
    down_conv,
    fold_weight_norm,
    in_single_precision,
    same_conv,
    up_conv,
)


class ResidualUnit(nn.Module):
    """`x + conv1(snake(conv7_dilated(snake(x))))`, keeping channels and length."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            same_conv(channels, channels, 7, dilation),  # hears 1 + 6 dilation samples
            Snake(channels),
            same_conv(channels, channels, 1, gain=BRANCH_GAIN),  # mixes channels, sample by sample
        )

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        return signal + self.layers(signal)


def residual_units(channels: int, count: int) -> nn.Sequential:
    """`count` residual units with dilations 1, 3, 9, ...: three of them hear 1 + 6 (1 + 3 + 9) = 79 samples."""
    return nn.Sequential(*(ResidualUnit(channels, 3**index) for index in range(count)))


class EncoderStage(nn.Module):
    """Residual units, then Snake and a convolution that divides the length by `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_units: int) -> None:
        super().__init__()
        self.units = residual_units(in_channels, num_units)  # at the rate that comes in
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
        audio_channels: A, of the input.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        num_units: Sequence[int],
        out_channels: int,
        audio_channels: int = 1,
    ) -> None:
        super().__init__()
        # Each stage is `stride` times slower and, in the published codec, up to twice as wide.
        self.stem = same_conv(audio_channels, widths[0], 7)  # at the rate of the audio
        self.stages = nn.Sequential(*map(EncoderStage, widths[:-1], widths[1:], strides, num_units))
        self.activation = Snake(widths[-1])
        self.head = same_conv(widths[-1], out_channels, 3)  # at that of the latent

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, A, T]` to `[B, out_channels, T / hop]`; T must be a multiple of the hop."""
        return self.head(self.activation(self.stages(self.stem(audio))))


class DecoderStage(nn.Module):
    """Snake and a transposed convolution that multiplies the length by `stride`, then residual units."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_units: int) -> None:
        super().__init__()
        self.activation = Snake(in_channels)
        self.resample = up_conv(in_channels, out_channels, stride)
        self.units = residual_units(out_channels, num_units)  # at the rate that goes out

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C_in, T]` to `[B, C_out, T * stride]`."""
        return self.units(self.resample(self.activation(signal)))


class Decoder(nn.Module):
    """Latent to audio.

    Args:
        in_channels: latent channels C.
        widths, strides, num_units: as the encoder's, in the encoder's order; built here from the last to the first.
        audio_channels: A, of the output.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        strides: Sequence[int],
        num_units: Sequence[int],
        audio_channels: int = 1,
    ) -> None:
        super().__init__()
        up = list(reversed(widths))  # from the latent's rate to the audio's
        self.stem = same_conv(in_channels, up[0], 7)  # hears 7 latent frames
        self.stages = nn.Sequential(*map(DecoderStage, up[:-1], up[1:], reversed(strides), reversed(num_units)))
        self.activation = Snake(up[-1])
        # Without a bias, which would be an offset of the audio.
        self.head = same_conv(up[-1], audio_channels, 7, bias=False, gain=HEAD_GAIN)

    def forward(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, A, L * hop]`."""
        return in_single_precision(self.head, self.activation(self.stages(self.stem(latent))))

    @property
    def context_frames(self) -> int:
        """How many latent frames before a frame, and after it, its audio hears."""
        return heard_frames(self)


def heard_frames(decoder: nn.Module) -> int:
    """The receptive field of a decoder's layers, which follow each other as it holds them: frames on either side."""
    # Backwards from the samples of frame 0, which are 0 to hop - 1, to the frames that they depend on.
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)]
    hop = prod(layer.stride[0] for layer in layers)  # samples for each frame; plain convolutions have a stride of 1
    first, last = 0, hop - 1
    for layer in reversed(layers):
        first, last = _heard(layer, first, last)
    return max(-first, last)  # the farther of the two ends


def _heard(layer: nn.Conv1d | nn.ConvTranspose1d, first: int, last: int) -> tuple[int, int]:
    """The first and the last input of a layer that its outputs `first` to `last` depend on."""
    # `reach`: from the first tap of the kernel to the last, in samples of the layer's faster side.
    reach, padding, stride = layer.dilation[0] * (layer.kernel_size[0] - 1), int(layer.padding[0]), layer.stride[0]
    if isinstance(layer, nn.ConvTranspose1d):
        # Input i reaches outputs i stride - padding to i stride - padding + reach; solved for i, rounded inwards.
        return -((reach - padding - first) // stride), (last + padding) // stride
    # Only strides of 1 here: output o hears inputs o - padding to o - padding + reach.
    return first - padding, last - padding + reach


class WaveformVAE(AudioVAE):
    """Fully convolutional VAE on waveforms (EzAudio, Section II-A; the Stable Audio and DAC family).

    Args:
        channels: width at the audio rate.
        multipliers: width after each stage, in units of `channels`.
        strides: down-sampling of each stage; their product is the hop.
        latent_channels: C.
        sample_rate_hz: rate of the audio.
        num_units: residual units of each stage (dilations 1, 3, 9); fewer at the audio rate make a codec cheap.
        audio_channels: A, which is 1 as published.
        mid_side: hear and make middle and side of two channels, in the place of left and right.

    Raises:
        ValueError: where the stages disagree in number, a stride is below 2, or middle and side are of other than two.

    Example:
        >>> import torch
        >>> codec = WaveformVAE(channels=8, multipliers=(1, 2), strides=(4, 6), latent_channels=4, num_units=(1, 1))
        >>> latent = codec.encode(torch.randn(1, 1, 2400))
        >>> latent.shape, codec.decode(latent).shape  # a hop of 4 * 6 samples
        (torch.Size([1, 4, 100]), torch.Size([1, 1, 2400]))
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (2, 4, 6, 10),
        latent_channels: int = 128,
        sample_rate_hz: int = 24000,
        num_units: Sequence[int] = (3, 3, 3, 3),
        audio_channels: int = 1,
        mid_side: bool = False,
    ) -> None:
        super().__init__()
        if not len(multipliers) == len(strides) == len(num_units):
            raise ValueError(
                f"multipliers {list(multipliers)}, strides {list(strides)} and num_units {list(num_units)} "
                "must have one entry for each stage"
            )
        if mid_side and audio_channels != 2:
            raise ValueError(f"mid_side=true takes audio_channels=2, left and right; got {audio_channels}")
        # One more than stages, for the audio itself.
        widths = [channels, *(channels * multiplier for multiplier in multipliers)]
        self.strides = tuple(strides)
        self.latent_channels = latent_channels
        self.sample_rate_hz = sample_rate_hz
        self.audio_channels, self.mid_side = audio_channels, mid_side
        self.encoder = Encoder(widths, strides, num_units, 2 * latent_channels, audio_channels)  # mean and scale
        self.decoder = Decoder(latent_channels, widths, strides, num_units, audio_channels)
        if self.encoder.head.bias is not None:
            # Of the scales, which follow the means.
            nn.init.constant_(self.encoder.head.bias[latent_channels:], INITIAL_SCALE)

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return prod(self.strides)

    @property
    def context_frames(self) -> int:
        """See `AudioVAE.context_frames`."""
        return self.decoder.context_frames

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`."""
        whole = self._whole_frames(audio)
        heard = to_mid_side(whole) if self.mid_side else whole  # [B, A, L hop]
        # [B, 2 C, L]; in single precision, since the posterior is sampled and compared from here on.
        mean, scale = self.encoder(heard).float().chunk(2, dim=1)
        return mean, scale

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to audio `[B, A, L * hop]`; not clipped."""
        return self.from_decoder(self.decoder(latent))

    def from_decoder(self, audio: Tensor) -> Tensor:
        """Left and right `[B, A, T]` of what the decoder makes, or that itself: for those who run it in other ways."""
        # Linear, so that it may follow any decoder that computes what ours does, chunk by chunk.
        return to_left_right(audio) if self.mid_side else audio

    def fold_weight_norm(self) -> "WaveformVAE":
        """Fold the weight norm for inference, in place; afterwards the state dict no longer fits the config."""
        fold_weight_norm(self)
        return self
