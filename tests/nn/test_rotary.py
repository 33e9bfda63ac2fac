import copy

import pytest
import torch

from foley.nn.rotary import RotaryEmbedding, RotaryExtension, apply_rotary, inverse_frequencies

CPU = torch.device("cpu")


def test_rotates_pairs_as_complex_numbers():
    x = torch.randn(2, 6, 3, 8)
    angles = torch.outer(torch.arange(6.0), inverse_frequencies(8))[:, None]
    rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    torch.testing.assert_close(apply_rotary(x, RotaryEmbedding(8)(6, CPU, torch.float32)), expected)


def test_scores_depend_on_relative_position_only():
    table = RotaryEmbedding(8)(20, CPU, torch.float32)
    query = apply_rotary(torch.randn(8).expand(1, 20, 1, 8), table)[0, :, 0]
    key = apply_rotary(torch.randn(8).expand(1, 20, 1, 8), table)[0, :, 0]
    scores = query @ key.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], atol=1e-5, rtol=1e-4)


def test_tables_are_kept_and_shorter_ones_are_views_of_longer_ones():
    rotary = RotaryEmbedding(8)
    long = rotary(10, CPU, torch.float32)
    short = rotary(4, CPU, torch.float32)
    assert short.cos.data_ptr() == long.cos.data_ptr()
    assert short.cos.shape == (4, 1, 8)
    torch.testing.assert_close(rotary(12, CPU, torch.float32).cos[:10], long.cos)


def test_a_table_made_in_inference_mode_serves_training():
    rotary, x = RotaryEmbedding(8), torch.randn(1, 4, 1, 8, requires_grad=True)
    with torch.inference_mode():
        rotary(4, CPU, torch.float32)
    apply_rotary(x, rotary(4, CPU, torch.float32)).sum().backward()
    assert x.grad is not None


def test_has_no_state_and_can_be_copied():
    rotary = RotaryEmbedding(8)
    rotary(4, CPU, torch.float32)
    assert not copy.deepcopy(rotary).state_dict()


def test_odd_dimensions_are_refused():
    with pytest.raises(ValueError, match="even head dimension, got 7"):
        RotaryEmbedding(7)


@pytest.mark.parametrize("method", ["linear", "ntk"])
def test_an_extension_leaves_trained_lengths_alone(method):
    plain, extended = RotaryEmbedding(8), RotaryEmbedding(8)
    extended.extension = RotaryExtension(method, 10)
    args = (torch.device("cpu"), torch.float32)
    assert torch.equal(plain(10, *args).cos, extended(10, *args).cos)
    assert not torch.equal(plain(20, *args).cos, extended(20, *args).cos)


def test_linear_extension_squeezes_positions_into_the_trained_range():
    extended = RotaryEmbedding(8)
    extended.extension = RotaryExtension("linear", 10)
    args = (torch.device("cpu"), torch.float32)
    torch.testing.assert_close(extended(20, *args).cos[::2], RotaryEmbedding(8)(10, *args).cos)


def test_ntk_keeps_the_highest_frequency_and_squeezes_the_lowest():
    ratio = inverse_frequencies(8) / RotaryExtension("ntk", 10).frequencies(8, 10000.0, 30)
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(3.0)
    assert (ratio.diff() > 0).all()


def test_an_unknown_extension_is_refused():
    with pytest.raises(ValueError, match="got 'yarn'"):
        RotaryExtension("yarn", 10)
