"""The discriminator of the mel VAE: it judges patches of a mel spectrogram seen as a picture."""

from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

_KERNEL = 4
_MOST_WIDENING = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017), weight-normalised: its judgement of a clip depends on no other of the batch.

    Args:
        filters: channels of the first layer; they double from layer to layer, up to eightfold.
        num_layers: layers that halve frequency and time.
    """

    def __init__(self, filters: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [1, *(filters * min(2**index, _MOST_WIDENING) for index in range(num_layers + 1))]
        strides = [*[2] * num_layers, 1]
        self.hidden = nn.ModuleList(map(_conv, widths[:-1], widths[1:], strides))
        self.logits = _conv(widths[-1], 1, 1)

    def forward(self, mel: Tensor) -> list[list[Tensor]]:
        """`[B, mel_bands, F]` to the feature maps of one scale, logits `[B, 1, H, W]` last."""
        signal, maps = mel[:, None], []
        for layer in self.hidden:
            signal = leaky_relu(layer(signal), 0.2)
            maps.append(signal)
        return [[*maps, self.logits(signal)]]


def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return weight_norm(nn.Conv2d(in_channels, out_channels, _KERNEL, stride, padding=1))
