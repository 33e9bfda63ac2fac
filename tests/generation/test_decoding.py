"""Decoding in inference: chunks without seams, half precision, and a codec that stays what it is."""

import pytest
import torch
from torch import nn

from foley.core.components import load_component, save_component
from foley.core.hashing import hash_module
from foley.generation.decoding import LatentDecoder
from foley.models.codec.waveform_vae import WaveformVAE

CONFIG = {
    "_target_": "foley.models.codec.waveform_vae.WaveformVAE",
    **{"channels": 8, "multipliers": [1, 2], "strides": [4, 10], "latent_channels": 4, "num_units": [3, 3]},
}


@pytest.fixture
def codec() -> WaveformVAE:
    torch.manual_seed(0)
    return WaveformVAE(**{key: value for key, value in CONFIG.items() if key != "_target_"}).eval()


@pytest.mark.parametrize("chunk_frames", [18, 7, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_chunks_have_no_seams(codec: WaveformVAE, chunk_frames: int, dtype: torch.dtype, tolerance: float) -> None:
    decode, latent = LatentDecoder(codec.to(dtype)), torch.randn(2, 4, 60, dtype=dtype)
    torch.testing.assert_close(decode(latent, chunk_frames), decode(latent), atol=tolerance, rtol=0)


def test_chunks_of_the_folded_decoder_have_no_seams(codec: WaveformVAE) -> None:
    decode, latent = LatentDecoder(codec, "bf16"), torch.randn(2, 4, 60)
    torch.testing.assert_close(decode(latent, 20), decode(latent), atol=2e-2, rtol=0)


def test_a_chunk_sees_no_more_than_its_context(codec: WaveformVAE) -> None:
    decode, latent = LatentDecoder(codec), torch.randn(1, 4, 60)
    lengths = []
    inner = decode._decode
    decode._decode = lambda part: (lengths.append(part.shape[-1]), inner(part))[1]
    decode(latent, 20)
    context = codec.decoder.context_frames
    assert lengths == [20 + context, 20 + 2 * context, 20 + context]


def test_the_codec_stays_what_it_is(codec: WaveformVAE, tmp_path) -> None:
    digest, latent = hash_module(codec), torch.randn(1, 4, 12)
    audio = [LatentDecoder(codec, precision)(latent) for precision in ("float32", "bf16")]
    assert hash_module(codec) == digest
    save_component(codec, CONFIG, tmp_path)
    loaded = load_component(tmp_path)
    assert hash_module(loaded) == digest
    torch.testing.assert_close(LatentDecoder(loaded)(latent), audio[0], atol=0, rtol=0)
    codec.train().decode(latent).square().mean().backward()
    assert all(parameter.grad is not None for parameter in codec.decoder.parameters())


def test_half_precision_is_close_and_comes_back_in_single(codec: WaveformVAE) -> None:
    latent = torch.randn(1, 4, 30)
    exact, rounded = codec.decode(latent), LatentDecoder(codec, "bf16")(latent, 10)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


class Repeat(nn.Module):
    """A codec of another kind."""

    hop_samples = 3

    def decode(self, latent):
        return latent.repeat_interleave(3, -1)


def test_other_codecs_decode_themselves() -> None:
    latent = torch.randn(1, 1, 5)
    assert torch.equal(LatentDecoder(Repeat())(latent, 2), Repeat().decode(latent))
    with pytest.raises(ValueError, match="Repeat only decodes in float32"):
        LatentDecoder(Repeat(), "bf16")
    with pytest.raises(ValueError, match="got 'int4'"):
        LatentDecoder(Repeat(), "int4")
