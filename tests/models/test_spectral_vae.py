import pytest
import torch

from foley.decoding import LatentDecoder
from foley.models.vae.spectral_vae import SpectralVAE


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return SpectralVAE(width=16, window_samples=64, frame_samples=16, pool=2, latent_channels=4, sample_rate_hz=8000)


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 500])
def test_lengths(codec, samples):
    audio = torch.randn(2, 1, samples)
    latent = codec.encode(audio)
    assert latent.shape == (2, 4, -(-samples // 32))
    assert codec.decode(latent).shape == (2, 1, latent.shape[-1] * codec.hop_samples)
    assert codec.reconstruct(audio).shape == audio.shape


def test_silence_is_finite_and_has_a_gradient(codec):
    audio = torch.zeros(1, 1, 256, requires_grad=True)
    reconstruction = codec.reconstruct(audio)
    reconstruction.square().sum().backward()
    assert reconstruction.isfinite().all()
    assert audio.grad.isfinite().all()


def test_a_frame_hears_its_context_and_no_more(codec):
    reach, frame, hop = codec.context_frames, 40, codec.hop_samples
    latent = torch.randn(1, 4, 80, requires_grad=True)
    codec.decode(latent)[..., frame * hop : (frame + 1) * hop].square().sum().backward()
    heard = latent.grad.abs().sum((0, 1)).nonzero()[:, 0]
    assert frame - reach <= heard.min() <= frame - reach + 1
    assert frame + reach - 1 <= heard.max() <= frame + reach


def test_chunks_have_no_seams(codec):
    latent = torch.randn(2, 4, 90)
    decode = LatentDecoder(codec)
    torch.testing.assert_close(decode(latent, chunk_frames=25), decode(latent), atol=1e-6, rtol=0)


def test_training_starts_quiet_and_with_a_narrow_posterior(codec):
    posterior = codec.posterior(torch.randn(1, 1, 320))
    assert posterior.std.max() < 0.05
    assert codec.decode(posterior.mean).abs().max() < 0.3


def test_stereo_is_refused(codec):
    with pytest.raises(ValueError, match=r"audio must be mono .* got shape \[1, 2, 64\]"):
        codec.encode(torch.zeros(1, 2, 64))
