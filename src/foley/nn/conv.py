"""Convolutions: weight norm and its folding, padding that keeps lengths, Snake, ConvNeXt blocks.

Weight norm (Salimans and Kingma 2016) writes a weight as `g v / |v|`, and so learns its size apart from its direction.
Folding computes that product once, for inference.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations, type_before_parametrizations

BRANCH_GAIN = 0.3
"""Of the ends of residual branches at the start: blocks begin near the identity, so deep stacks keep their variance."""

HEAD_GAIN = 0.1
"""Of the last layer before the audio at the start: training begins from a quiet output, not from loud noise."""

_SMALLEST_BETA = 1e-9  # keeps 1 / beta finite
_Conv = TypeVar("_Conv", nn.Conv1d, nn.ConvTranspose1d)


def same_conv(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1, bias: bool = True, gain: float = 1.0
) -> nn.Conv1d:
    """A weight-normalised convolution that keeps the length; `kernel` must be odd.

    It starts with the variance of its input times `gain ** 2`; small gains suit the ends of residual branches.
    """
    padding = dilation * (kernel - 1) // 2  # T + 2 padding - dilation (kernel - 1) = T
    conv = nn.Conv1d(in_channels, out_channels, kernel, dilation=dilation, padding=padding, bias=bias)
    return _initialise(conv, fan_in=in_channels * kernel, gain=gain)


def in_single_precision(head: nn.Conv1d, signal: Tensor) -> Tensor:
    """`head(signal)` in the type of its weights, autocast or not: audio rounded to bfloat16 hisses."""
    with torch.autocast(signal.device.type, enabled=False):
        return cast(Tensor, head(signal.to(head.weight.dtype)))


def down_conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv1d:
    """A weight-normalised convolution over `2 * stride` samples that divides the length by `stride`."""
    check_stride(stride)
    # Where the length T is a multiple, (T + 2 padding - 2 stride) // stride + 1 = T / stride; windows overlap by half.
    conv = nn.Conv1d(in_channels, out_channels, 2 * stride, stride, padding=_half(stride))
    return _initialise(conv, fan_in=in_channels * 2 * stride)


def up_conv(in_channels: int, out_channels: int, stride: int) -> nn.ConvTranspose1d:
    """The transposed counterpart of `down_conv`: multiplies the length by `stride`."""
    check_stride(stride)
    # Of an odd stride the padding cuts off one sample too many, which `output_padding` gives back.
    conv = nn.ConvTranspose1d(
        in_channels, out_channels, 2 * stride, stride, padding=_half(stride), output_padding=stride % 2
    )
    return _initialise(conv, fan_in=in_channels * 2)  # each output hears two taps of each channel


def _initialise(conv: _Conv, fan_in: int, gain: float = 1.0) -> _Conv:
    """Variance-preserving weights: PyTorch's own start shrinks the signal threefold in each of dozens of layers."""
    nn.init.normal_(conv.weight, std=gain * fan_in**-0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return weight_norm(conv)  # it takes g = |v| at first, so that the weight stays what it is


def _half(stride: int) -> int:
    return -(-stride // 2)


def check_stride(stride: int) -> None:
    """Raise ValueError for a stride that is none."""
    if stride < 2:
        raise ValueError(f"stride {stride} must be 2 or more: the convolution changes the length by it")


def fold_weight_norm(module: nn.Module) -> None:
    """Replace every weight-normalised weight inside `module` by its value: faster, and no longer trainable as such."""
    for part in module.modules():
        if is_parametrized(part, "weight"):
            remove_parametrizations(part, "weight")  # g v / |v|, once and for all


def folded_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` with its weight norm folded; the module itself stays as it is.

    A copied convolution shares its class with the original, and folding it would break both: it is built anew.
    """
    parts = [part for part in module.modules() if is_parametrized(part, "weight")]
    return deepcopy(module, {id(part): _plain(part) for part in parts})


def _plain(conv: Any) -> nn.Module:
    """A convolution without weight norm that has the weights of `conv`."""
    options = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    # Weight norm puts a subclass in the place of the class; what it was before is the one to build.
    plain = type_before_parametrizations(conv)(
        conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta", **options
    )
    values = {"weight": conv.weight, "bias": conv.bias}
    state = {name: value.detach().clone() for name, value in values.items() if value is not None}
    plain.load_state_dict(state, assign=True)
    return plain


class Snake(nn.Module):
    """Periodic activation `x + sin^2(alpha x) / beta` with one alpha and beta per channel, both in log scale.

    Source: Ziyin et al. 2020 (Snake); the separate amplitude is BigVGAN's SnakeBeta.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.log_beta = nn.Parameter(torch.zeros(channels))

    def forward(self, signal: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        alpha, gain = self.coefficients()
        return snake(signal, alpha[:, None], gain[:, None])  # [C, 1] over [B, C, T]

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """`alpha` and `1 / beta`, each `[C]`."""
        # In log scale both stay positive, and start at one.
        return self.log_alpha.exp(), (self.log_beta.exp() + _SMALLEST_BETA).reciprocal()


class _Snake(torch.autograd.Function):
    """Snake that stores only its input: activations at the audio rate are bound by memory traffic."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(signal, alpha, gain)
        # x + gain sin^2(alpha x), over [B, C, T]
        return torch.addcmul(signal, (signal * alpha).sin_().square_(), gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        signal, alpha, gain = ctx.saved_tensors
        # With u = alpha x, sin^2 u = (1 - cos 2u) / 2, and its derivative is sin 2u:
        #   d/dx = 1 + alpha gain sin 2u,   d/dalpha = gain x sin 2u,   d/dgain = (1 - cos 2u) / 2.
        double_angle = signal * (2 * alpha)
        weighted = gradient * double_angle.sin()  # g sin 2u, g the gradient that arrives
        by_gain = 0.5 * (gradient - gradient * double_angle.cos_()).sum((0, 2), keepdim=True)[0]  # [1, C, 1] to [C, 1]
        by_alpha = (weighted * signal).sum((0, 2), keepdim=True)[0] * gain
        return torch.addcmul(gradient, weighted, alpha * gain), by_alpha, by_gain


snake: Callable[[Tensor, Tensor, Tensor], Tensor] = _Snake.apply
"""`(signal [B, C, T], alpha [C, 1], gain [C, 1])` to `signal + gain sin^2(alpha signal)`."""


_KERNEL = 7
_EXPANSION = 3  # hidden width over D, as in Vocos


class ConvNeXtBlock(nn.Module):
    """`x + scale * mlp(norm(depthwise(x)))` over rows (Liu et al. 2022; over time as in Siuzdak 2023, Vocos)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # One filter for each channel.
        self.depthwise = nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, _EXPANSION * width), nn.GELU(), nn.Linear(_EXPANSION * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), BRANCH_GAIN))  # LayerScale: one factor for each channel

    def forward(self, rows: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        mixed = self.depthwise(rows.transpose(1, 2)).transpose(1, 2)  # over time, each channel by itself
        return rows + self.scale * self.layers(self.norm(mixed))

    @property
    def reach(self) -> int:
        """Rows before and after a row that its output depends on."""
        return _KERNEL // 2


def convnext(width: int, count: int) -> nn.Sequential:
    """`count` blocks in a row."""
    return nn.Sequential(*(ConvNeXtBlock(width) for _ in range(count)))
