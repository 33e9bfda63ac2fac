"""The mel codec has what every codec has: rates, lengths, randomness, hashes, files, chunks."""

from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from mel_codec_parts import CODEC, MEL_VAE, SPECTROGRAM, VOCODER, mel_codec

from foley.core.components import build_component, load_component, save_component
from foley.core.hashing import hash_module
from foley.core.seeding import torch_generator
from foley.generation.decoding import LatentDecoder
from foley.models.codec.mel_codec import MelCodec


@pytest.fixture
def codec() -> MelCodec:
    torch.manual_seed(0)
    return mel_codec()


def test_rates_follow_from_the_parts(codec: MelCodec) -> None:
    assert (codec.hop_samples, codec.latent_channels, codec.sample_rate_hz) == (512, 20, 16000)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (512, 1), (513, 2), (16001, 32)])
@torch.no_grad()
def test_any_length_makes_whole_frames_and_comes_back(codec: MelCodec, samples: int, frames: int) -> None:
    audio = torch.randn(2, 1, samples)
    latent = codec.encode(audio)
    assert latent.shape == (2, 20, frames)
    assert codec.decode(latent).shape == (2, 1, frames * 512)
    assert codec.reconstruct(audio).shape == audio.shape
    padded = torch.nn.functional.pad(audio, (0, frames * 512 - samples))
    torch.testing.assert_close(codec.encode(padded), latent)


@torch.no_grad()
def test_encoding_is_the_mean_or_a_repeatable_draw(codec: MelCodec) -> None:
    audio = torch.randn(1, 1, 2048)
    posterior = codec.posterior(audio)
    torch.testing.assert_close(codec.encode(audio), posterior.mean)
    assert posterior.std.max() < 0.1  # little noise at first
    first, again = (codec.encode(audio, torch_generator("test", 1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, posterior.mean)


@torch.no_grad()
def test_two_convolutions_of_one_frame_lie_around_the_latent(codec: MelCodec) -> None:
    mel_vae, mel, latent = codec.mel_vae, torch.randn(1, 80, 8), torch.randn(1, 20, 4)
    raw, plain = mel_vae.encoder(mel), mel_vae.decoder(latent)
    for conv, gain in ((mel_vae.quantisation, 2.0), (mel_vae.dequantisation, -1.0)):
        conv.weight.copy_(gain * torch.eye(conv.out_channels)[..., None])
        conv.bias.zero_()
    torch.testing.assert_close(torch.cat(mel_vae.encode_moments(mel), 1), 2 * raw)
    torch.testing.assert_close(mel_vae.decode(-latent), plain)


@pytest.mark.parametrize("shape", [(1, 2, 1024), (1, 1024), (1, 1, 0)])
def test_audio_that_is_not_mono_is_refused(codec: MelCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mono"):
        codec.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocoder": {**VOCODER, "spectrogram": {**SPECTROGRAM, "highest_hz": 7600.0}}}, "made for spectrograms"),
        ({"latent_channels": 8}, "are not the mel VAE's, 20 and 16000"),
        ({"mel_vae": {**MEL_VAE, "strides": [2]}}, "one entry for each stage"),
        ({"mel_vae": {**MEL_VAE, "strides": [3, 1]}}, "must be 1 or 2"),
    ],
)
def test_parts_that_disagree_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InstantiationException, match=message):
        build_component({**CODEC, **changes})


@torch.no_grad()
def test_it_is_saved_and_loaded_as_it_is(codec: MelCodec, tmp_path: Path) -> None:
    save_component(codec, CODEC, tmp_path)
    loaded, audio = load_component(tmp_path), torch.randn(1, 1, 2000)
    assert hash_module(loaded) == hash_module(codec)
    assert torch.equal(loaded.reconstruct(audio), codec.reconstruct(audio))


@pytest.mark.parametrize("chunk_frames", [9, 4])
def test_chunks_have_no_seams(codec: MelCodec, chunk_frames: int) -> None:
    digest = hash_module(codec)
    decode, latent = LatentDecoder(codec), torch.randn(2, 20, 30)
    whole = decode(latent)
    lengths: list[int] = []
    inner = decode._decode
    decode._decode = lambda part: (lengths.append(part.shape[-1]), inner(part))[1]
    chunked = decode(latent, chunk_frames)
    assert max(lengths) <= 2 * chunk_frames + 2 * codec.vocoder.context_frames
    assert len(lengths) == -(-30 // chunk_frames)
    torch.testing.assert_close(chunked, whole, atol=5e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(whole, codec.decode(latent), atol=5e-6, rtol=0)
    assert hash_module(codec) == digest


@torch.no_grad()
def test_half_precision_is_close_and_comes_back_in_single(codec: MelCodec) -> None:
    latent = torch.randn(1, 20, 12)
    exact, rounded = codec.decode(latent), LatentDecoder(codec, "bf16")(latent)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
