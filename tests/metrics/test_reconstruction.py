"""Closed forms of the reconstruction metrics, and the baselines of codecs."""

import math
import sys

import pytest
import torch
from torchaudio.functional import lowpass_biquad

from foley.metrics.reconstruction import GriffinLim, Opus, _visqol, mel_distance, si_sdr, stft_distance, visqol
from foley.models.codec.spectral_vae import SpectralVAE


def test_si_sdr_of_orthogonal_noise() -> None:
    time = torch.arange(2400) / 24000
    reference = torch.sin(2 * math.pi * 100 * time)[None, None]
    noise = torch.cos(2 * math.pi * 100 * time)[None, None]
    torch.testing.assert_close(si_sdr(reference + 0.1 * noise, reference), torch.tensor([20.0]), atol=1e-3, rtol=0)
    scaled = si_sdr(3 * (reference + 0.1 * noise) + 0.5, reference)
    torch.testing.assert_close(scaled, torch.tensor([20.0]), atol=1e-3, rtol=0)


def test_distances_of_a_scaled_signal() -> None:
    audio = torch.randn(2, 1, 4800)
    expected = torch.full((2,), math.log(2))
    torch.testing.assert_close(mel_distance(2 * audio, audio, 24000), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(stft_distance(2 * audio, audio), expected, atol=1e-3, rtol=1e-3)


def test_silence_is_finite() -> None:
    silence = torch.zeros(1, 1, 4800)
    assert si_sdr(silence, silence).isfinite().all()
    assert mel_distance(silence, silence, 24000) == 0


def coloured_noise(seconds: float) -> torch.Tensor:
    """Mono noise `[1, 1, T]` with less towards high frequencies, as sounds have it."""
    white = torch.randn(1, round(24000 * seconds), generator=torch.Generator().manual_seed(0))
    return 0.3 * lowpass_biquad(white, 24000, 2000.0)[None]


@pytest.mark.parametrize("kilobits_per_second", [12, 24, 64])
def test_opus_spends_about_the_bits_that_it_is_given(kilobits_per_second: float) -> None:
    content = Opus(kilobits_per_second).encode(coloured_noise(10)[0, 0].numpy())
    assert len(content) * 8 / 10 / 1000 == pytest.approx(kilobits_per_second, rel=0.2)


def test_opus_gives_back_what_it_got_without_delay() -> None:
    audio = coloured_noise(1)
    restored = Opus(128).reconstruct(audio)
    assert restored.shape == audio.shape
    spectra = [torch.fft.rfft(signal[0, 0], 2 * audio.shape[-1]) for signal in (restored, audio)]
    assert torch.fft.irfft(spectra[0] * spectra[1].conj()).argmax() == 0
    assert si_sdr(restored, audio) > 10
    assert si_sdr(Opus(6).reconstruct(audio), audio) < si_sdr(restored, audio)


def test_opus_refuses_a_rate_that_its_encoder_does_not_know() -> None:
    with pytest.raises(ValueError, match="kilobits_per_second=3: give a number >= 6"):
        Opus(3)


def test_rates_of_latents_and_mel_bands() -> None:
    codec = SpectralVAE(width=8, latent_channels=32)
    assert codec.kilobits_per_second == pytest.approx(16 * 32 * 50 / 1000)  # 50 frames a second
    assert GriffinLim(24000).kilobits_per_second == pytest.approx(16 * 80 * 93.75 / 1000)


@pytest.mark.slow  # its package compiles what it does
def test_visqol_of_the_same_and_of_what_is_damaged() -> None:
    pytest.importorskip("visqol")
    audio = coloured_noise(0.6).repeat(2, 1, 1)
    worse = audio + torch.tensor([0.0, 0.1])[:, None, None] * torch.randn(audio.shape)
    same, damaged = visqol(worse, audio, 24000).tolist()
    assert same == pytest.approx(4.73, abs=0.01)  # the most that its mode for all sounds gives
    assert 1 <= damaged < same - 0.2


def test_without_visqol_its_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "visqol", None)
    _visqol.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install visqol-python"):
        visqol(torch.zeros(1, 1, 24000), torch.zeros(1, 1, 24000), 24000)
