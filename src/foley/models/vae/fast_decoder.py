"""The decoder for inference on a CPU: weights folded, time along rows, every convolution a few matrix products."""

from typing import Any

import torch
from torch import Tensor, nn

from foley.models.vae.decoder import Decoder
from foley.nn.conv import Snake
from foley.nn.winograd import WinogradConv

_BLOCK_ROWS = 512


class FastDecoder(nn.Module):
    """What `decoder` computes, within rounding, in less time; a snapshot of its weights, without gradients.

    A convolution of 7 taps is done by minimal filtering; so is a transposed one, which is a convolution of 2 taps
    with `stride` times the channels. Intermediate results of a residual unit never leave the cache.
    """

    head: Tensor

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.stem = _same(decoder.stem)
        self.stages = nn.Sequential(*map(_FastStage, decoder.stages))
        self.activation = _FastSnake(decoder.activation)
        self.register_buffer("head", decoder.head.weight.detach()[0].clone())

    @torch.no_grad()
    def forward(self, latent: Tensor) -> Tensor:
        """`[B, C, L]` to `[B, 1, L * hop]`, one item after the other."""
        return torch.stack([self._audio(item.T) for item in latent])

    def _audio(self, rows: Tensor) -> Tensor:
        """`[L, C]` to `[1, L * hop]`."""
        rows = self.stages(self.stem(rows))
        taps = self.head.shape[1]
        each = rows.new_zeros(len(rows) + taps - 1, taps)
        inner = each[taps // 2 : taps // 2 + len(rows)]
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            torch.mm(self.activation(rows[part]), self.head, out=inner[part])
        return each.as_strided((len(rows), taps), (taps, taps + 1)).sum(1)[None]  # along diagonals


class _FastSnake(nn.Module):
    """Snake over rows, with the exponentials of its parameters taken beforehand."""

    alpha: Tensor
    gain: Tensor

    def __init__(self, snake: Snake) -> None:
        super().__init__()
        alpha, gain = snake.coefficients()
        self.register_buffer("alpha", alpha.detach())
        self.register_buffer("gain", gain.detach())

    def forward(self, rows: Tensor) -> Tensor:
        """`[T, C]` to `[T, C]`, in place."""
        return rows.addcmul_((rows * self.alpha).sin_().square_(), self.gain)

    def fill(self, target: Tensor, rows: Tensor) -> None:
        """Write the activation of `rows` `[T, C]` to `target`, in blocks that stay in the cache."""
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            torch.addcmul(rows[part], (rows[part] * self.alpha).sin_().square_(), self.gain, out=target[part])


class _FastUnit(nn.Module):
    """A residual unit over rows, in place."""

    weight: Tensor
    bias: Tensor

    def __init__(self, unit: Any) -> None:
        super().__init__()
        first, conv, second, mix = unit.layers
        self.first, self.second = _FastSnake(first), _FastSnake(second)
        self.conv = _same(conv)
        self.register_buffer("weight", mix.weight.detach()[..., 0].T.contiguous())
        self.register_buffer("bias", mix.bias.detach())

    def forward(self, rows: Tensor) -> Tensor:
        buffer, signal = self.conv.padded(len(rows))
        self.first.fill(signal, rows)
        for part, hidden in self.conv.blocks(buffer, len(rows)):
            rows[part].addmm_(self.second(hidden), self.weight).add_(self.bias)
        return rows


class _FastStage(nn.Module):
    """Snake, the transposed convolution and the residual units, over rows."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.activation = _FastSnake(stage.activation)
        self.stride = stage.resample.stride[0]
        self.resample = _transposed(stage.resample)
        self.units = nn.Sequential(*map(_FastUnit, stage.units))

    def forward(self, rows: Tensor) -> Tensor:
        """`[T, C_in]` to `[T * stride, C_out]`."""
        buffer, signal = self.resample.padded(len(rows))
        self.activation.fill(signal, rows)
        num_rows = self.resample.output_rows(len(rows))
        output = rows.new_empty(num_rows, self.resample.bias.numel())
        for part, block in self.resample.blocks(buffer, num_rows):
            output[part] = block
        margin = self.stride // 2
        signal = output.view(num_rows * self.stride, -1)[margin : margin + len(rows) * self.stride]
        return self.units(signal)


def _same(conv: Any) -> WinogradConv:
    """Of a weight-normalised `nn.Conv1d`."""
    return WinogradConv(conv.weight.permute(2, 1, 0), conv.bias, conv.dilation[0], conv.padding[0])


def _transposed(conv: Any) -> WinogradConv:
    """Of a weight-normalised `nn.ConvTranspose1d`: sample j hears this frame at tap j, the last at `stride + j`."""
    stride = conv.stride[0]
    frames = conv.weight.unflatten(2, (2, stride)).permute(2, 0, 3, 1).flatten(2)
    return WinogradConv(frames.flip(0), conv.bias.repeat(stride), dilation=1, padding=1)
