"""Snake's closed form and gradient; lengths of the resampling convolutions."""

import pytest
import torch

from foley.nn.conv import Snake, down_conv, fold_weight_norm, folded_copy, same_conv, snake, up_conv


def test_snake_is_its_formula() -> None:
    layer = Snake(3)
    torch.nn.init.normal_(layer.log_alpha)
    torch.nn.init.normal_(layer.log_beta)
    signal = torch.randn(2, 3, 5)
    alpha, beta = layer.log_alpha.exp()[:, None], layer.log_beta.exp()[:, None]
    torch.testing.assert_close(layer(signal), signal + torch.sin(alpha * signal) ** 2 / beta)


def test_snake_gradient() -> None:
    parts = (torch.randn(2, 3, 4), torch.rand(3, 1) + 0.5, torch.rand(3, 1) + 0.5)
    inputs = [part.double().requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(snake, inputs)


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 6, 7, 10])
def test_lengths_are_exact(stride: int) -> None:
    down, up = down_conv(1, 2, stride), up_conv(2, 1, stride)
    assert down(torch.zeros(1, 1, 7 * stride)).shape == (1, 2, 7)
    assert up(torch.zeros(1, 2, 7)).shape == (1, 1, 7 * stride)


def test_a_stride_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 1 must be 2 or more"):
        down_conv(1, 1, 1)


def test_folding_keeps_the_output_and_simplifies_the_state() -> None:
    layer = same_conv(2, 3, 7, dilation=3)
    signal = torch.randn(1, 2, 20)
    before = layer(signal)
    fold_weight_norm(layer)
    torch.testing.assert_close(layer(signal), before)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_folded_copy_leaves_the_original_alone():
    original = torch.nn.Sequential(same_conv(2, 3, 7, dilation=3), up_conv(3, 2, 4), Snake(2))
    signal, keys = torch.randn(1, 2, 20), set(original.state_dict())
    expected = original(signal)
    copied = folded_copy(original)
    torch.testing.assert_close(copied(signal), expected)
    assert {"0.weight", "1.bias", "2.log_alpha"} <= set(copied.state_dict())
    copied.double()
    assert set(original.state_dict()) == keys
    torch.testing.assert_close(original(signal), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "layer", [same_conv(64, 64, 7), same_conv(64, 64, 7, dilation=9), down_conv(64, 64, 10), up_conv(64, 64, 10)]
)
def test_fresh_convolutions_keep_the_variance(layer: torch.nn.Module) -> None:
    torch.manual_seed(0)
    output = layer(torch.randn(8, 64, 1000))
    margin = output.shape[-1] // 4  # away from the zeros beyond the ends
    assert output[..., margin:-margin].std().item() == pytest.approx(1.0, abs=0.1)
