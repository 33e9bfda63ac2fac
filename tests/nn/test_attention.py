import pytest
import torch

from foley.nn.attention import Attention
from foley.nn.rotary import RotaryEmbedding


def test_equals_softmax_attention_written_out():
    attention = Attention(width=16, num_heads=2, qk_norm=False)
    x = torch.randn(3, 7, 16)

    def split(y):
        return y.reshape(3, 7, 2, 8).transpose(1, 2)

    query, key, value = split(attention.to_q(x)), split(attention.to_k(x)), split(attention.to_v(x))
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    expected = attention.output((weights @ value).transpose(1, 2).reshape(3, 7, 16))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_masked_keys_are_as_if_absent():
    attention, x = Attention(width=16, num_heads=2), torch.randn(2, 9, 16)
    mask = torch.arange(9) < 5
    torch.testing.assert_close(attention(x, mask[None, None, None])[:, :5], attention(x[:, :5]), atol=1e-5, rtol=1e-4)


def test_query_and_key_norms_make_the_scale_of_the_projections_irrelevant():
    attention, x = Attention(width=16, num_heads=2), torch.randn(2, 9, 16)
    before = attention(x)
    with torch.no_grad():
        attention.to_q.weight.mul_(50)
        attention.to_k.weight.mul_(50)
    torch.testing.assert_close(attention(x), before, atol=1e-3, rtol=1e-3)


def test_keys_and_values_of_a_context_can_be_made_once():
    attention = Attention(width=16, num_heads=2)
    rotary = RotaryEmbedding(8)(9, torch.device("cpu"), torch.float32)
    x = torch.randn(2, 9, 16)
    assert torch.equal(attention(x, rotary=rotary), attention.attend(x, attention.keys_values(x, rotary), None, rotary))


def test_the_core_can_be_swapped():
    attention, x = Attention(width=16, num_heads=2), torch.randn(2, 9, 16)
    attention.core = lambda query, key, value, mask: value
    torch.testing.assert_close(attention(x), attention.output(attention.to_v(x)))


def test_zero_output_starts_at_zero():
    assert not Attention(width=16, num_heads=2, zero_output=True)(torch.randn(2, 9, 16)).any()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 16 does not divide into 3 heads"):
        Attention(width=16, num_heads=3)
