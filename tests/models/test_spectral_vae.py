import pytest
import torch
from scipy.fft import dct

from foley.losses.spectral import BandedLogLoss
from foley.models.codec.spectral_vae import Cepstrum, SpectralVAE


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


def test_a_latent_reaches_so_many_spectra_and_no_more(codec):
    reach, frame = codec.decoder.reach_frames, 40
    latent = torch.randn(1, 4, 80, requires_grad=True)
    codec.decode_spectra(latent)[:, frame * 2 : (frame + 1) * 2].square().sum().backward()
    heard = latent.grad.abs().sum((0, 1)).nonzero()[:, 0]
    assert frame - reach <= heard.min() <= frame - reach + 1
    assert frame + reach - 1 <= heard.max() <= frame + reach


def test_silence_is_decoded_as_silence(codec):
    spectra = codec.spectra(torch.zeros(1, 1, 320))
    assert torch.equal(spectra, torch.full_like(spectra, codec.floor).log())
    assert torch.equal(codec.phase(spectra), torch.zeros(1, 1, 320))


def test_phases_do_not_matter_to_the_encoder(codec):
    audio = torch.randn(1, 1, 640)
    torch.testing.assert_close(codec.encode(-audio), codec.encode(audio))


def test_training_starts_with_a_narrow_posterior(codec):
    assert codec.posterior(torch.randn(1, 1, 320)).std.max() < 0.05


def test_stereo_is_refused(codec):
    with pytest.raises(ValueError, match=r"audio must be mono .* got shape \[1, 2, 64\]"):
        codec.encode(torch.zeros(1, 2, 64))


def test_bands_tell_levels_not_places():
    loss = BandedLogLoss(sample_rate_hz=8000, window_samples=512, mel_bands=4)
    spectra = torch.randn(1, 3, 257)
    torch.testing.assert_close(loss(spectra + 0.7, spectra), torch.tensor(0.7))


@pytest.fixture(scope="module")
def learning():
    torch.manual_seed(0)
    sizes = {"window_samples": 64, "frame_samples": 16, "pool": 2}
    return SpectralVAE(16, **sizes, latent_channels=4, sample_rate_hz=8000, floor=1e-6, learns_phases=True)


def test_learnt_phases_are_directions_and_magnitudes_are_those_that_are_said(learning):
    audio = torch.randn(1, 1, 640)
    spectra = learning.stft(audio[:, 0])
    real, imaginary = 3 * spectra.real, 3 * spectra.imag  # of any length but zero
    rows = torch.cat([spectra.abs().clamp(min=1e-9).log(), real, imaginary], dim=-1)
    torch.testing.assert_close(learning.phase(rows), audio, atol=2e-3, rtol=1e-3)
    silent = torch.cat([torch.full_like(spectra.real, -40.0), real, imaginary], dim=-1)
    assert learning.phase(silent).abs().max() < 1e-15
    loud = torch.cat([torch.full_like(spectra.real, 40.0), real, imaginary], dim=-1)
    assert learning.stft(learning.phase(loud)[:, 0]).abs().max() < 2 * learning.stft.full_scale


def test_with_learnt_phases_what_is_heard_reaches_so_far_and_all_of_it_trains(learning):
    latent = torch.randn(1, 4, 80, requires_grad=True)
    audio, frame, hop = learning.decode(latent), 40, learning.hop_samples
    assert audio.shape == (1, 1, 80 * hop)
    audio[..., frame * hop : (frame + 1) * hop].square().sum().backward()
    heard = latent.grad.abs().sum((0, 1)).nonzero()[:, 0]
    assert frame - learning.context_frames <= heard.min() < heard.max() <= frame + learning.context_frames
    assert all(parameter.grad.abs().any() for name, parameter in learning.named_parameters() if "decoder" in name)
    assert learning.reconstruct(torch.randn(2, 1, 100)).shape == (2, 1, 100)


def test_searched_phases_hear_all_there_is(codec):
    assert codec.context_frames is None


def test_cepstra_are_cosine_transforms_of_like_size_and_lose_nothing():
    scaling, spectra = Cepstrum(33), 3 * torch.randn(2, 5, 33) - 5
    coefficients = scaling(spectra)
    expected = torch.from_numpy(dct((spectra + 5).numpy(), norm="ortho"))
    torch.testing.assert_close(coefficients * (50 / torch.arange(1, 34) + 0.7), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaling.inverse(coefficients), spectra, rtol=1e-4, atol=1e-4)


def test_half_precision_rounds_no_harmonic_off_a_level():
    """The first coefficient is seventy times as large as the last: bfloat16 of log magnitudes would hide those."""
    torch.manual_seed(0)
    sizes = {"window_samples": 64, "frame_samples": 16, "pool": 2, "sample_rate_hz": 8000}
    codec = SpectralVAE(16, **sizes, latent_channels=4, floor=1e-6, learns_phases=True, cepstral=True)
    audio = torch.randn(1, 1, 640)
    loud = codec.spectra(audio) + 8
    rippled = loud + 0.02 * (torch.arange(33) % 2 - 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        difference = codec.encoder(rippled) - codec.encoder(loud)
    exact = codec.encoder(rippled) - codec.encoder(loud)
    assert torch.cosine_similarity(difference.flatten(), exact.flatten(), dim=0) > 0.5
    assert codec.decode(codec.encode(audio)).shape == audio.shape
