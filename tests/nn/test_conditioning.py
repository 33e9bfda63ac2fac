"""Time conditioning: embeddings, modulation schemes, modulated norm; and the feed-forward layer."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from foley.nn.adaln import AdaLN, AdaLNSingle, AdaLNSola, ModulatedNorm, Modulation, TimeToken
from foley.nn.embedding import (
    GuidanceEmbedding,
    LearnedPositions,
    LengthEmbedding,
    TimeEmbedding,
    guidance_sinusoids,
    sinusoidal_embedding,
)
from foley.nn.feedforward import GegluFeedForward

SCHEMES = [AdaLN(), AdaLNSingle(), AdaLNSola(rank=2, alpha=4)]


def block_modulation(scheme, time):
    shared = scheme.build_shared(16)
    return scheme.build_block(16)(time, shared(time) if shared else None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_start_open_and_unmodulated(scheme):
    modulation = block_modulation(scheme, torch.randn(3, 16))
    for part in (modulation.self_attention, modulation.feed_forward):
        assert part.shift.shape == (3, 1, 16)
        assert not part.shift.any()
        assert (part.factor == 1).all()
        assert (part.gate == 1).all()


def test_sola_is_shared_projection_plus_scaled_low_rank_plus_table():
    block, time, shared = AdaLNSola(rank=2, alpha=6).build_block(16), torch.randn(3, 16), torch.randn(3, 96)
    torch.nn.init.normal_(block.up.weight)
    torch.nn.init.normal_(block.table)
    expected = shared + 3 * (time @ block.down.weight.T @ block.up.weight.T) + block.table.reshape(-1)
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = expected.reshape(3, 6, 1, 16).unbind(1)
    modulation = block(time, shared)
    torch.testing.assert_close(modulation.self_attention.shift, shift_a)
    torch.testing.assert_close(modulation.self_attention.factor, 1 + scale_a)
    torch.testing.assert_close(modulation.self_attention.gate, 1 - gate_a)
    torch.testing.assert_close(modulation.feed_forward.shift, shift_f)
    torch.testing.assert_close(modulation.feed_forward.factor, 1 + scale_f)
    torch.testing.assert_close(modulation.feed_forward.gate, 1 - gate_f)


def test_a_time_token_does_not_modulate():
    modulation = block_modulation(TimeToken(), torch.randn(3, 16))
    assert modulation.self_attention is None
    assert modulation.feed_forward is None


def test_modulated_norm_is_layer_norm_shifted_and_scaled():
    norm, x = ModulatedNorm(16), torch.randn(2, 5, 16)
    shift, factor = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    plain = F.layer_norm(x, (16,))
    torch.testing.assert_close(norm(x), plain)
    torch.testing.assert_close(norm(x, Modulation(shift, factor, factor)), plain * factor + shift)


def test_sinusoids_are_cosines_then_sines():
    embedding = sinusoidal_embedding(torch.tensor([0, 3]), dim=8)
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(3 * f) for f in frequencies] + [math.sin(3 * f) for f in frequencies]
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(embedding[1], torch.tensor(expected))


def test_time_embedding_takes_integer_and_real_times_alike():
    embedding = TimeEmbedding(16)
    assert torch.equal(embedding(torch.tensor([7])), embedding(torch.tensor([7.0])))


def test_learned_positions_refuse_longer_inputs():
    positions = LearnedPositions(max_length=4, width=16)
    assert torch.equal(positions(torch.zeros(1, 3, 16))[0], positions.table[:3])
    with pytest.raises(ValueError, match="5 frames exceed the 4 learned positions"):
        positions(torch.zeros(1, 5, 16))


def test_geglu_gates_its_first_half_with_gelu_of_its_second():
    layer, x = GegluFeedForward(16, 24), torch.randn(2, 5, 16)
    projected = layer.input(x)
    expected = layer.output(projected[..., :24] * F.gelu(projected[..., 24:]))
    torch.testing.assert_close(layer(x), expected)


def test_golden_guidance_embedding(shared):
    golden = load_file(shared / "golden" / "audiolcm.safetensors")
    torch.testing.assert_close(guidance_sinusoids(golden["embed.w"], 256), golden["embed.out"], atol=1e-5, rtol=0)


def test_a_guidance_embedding_starts_at_zero_and_learns_at_once():
    embedding, scale = GuidanceEmbedding(16), torch.tensor([5.0, 7.5])
    output = embedding(scale)
    assert output.shape == (2, 16)
    assert not output.any()
    output.sum().backward()
    assert embedding.projection.weight.grad.any()


def test_a_length_embedding_starts_at_zero_and_tells_lengths_apart():
    embedding, frames = LengthEmbedding(16), torch.tensor([50, 500])
    assert not embedding(frames).any()
    torch.nn.init.normal_(embedding.projection.weight)
    short, long = embedding(frames)
    assert (short - long).norm() > 0.5 * short.norm()
    torch.testing.assert_close(embedding(torch.tensor([50.0])), short[None])
