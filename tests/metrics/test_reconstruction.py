"""Closed forms of the reconstruction metrics."""

import math

import torch

from foley.metrics.reconstruction import mel_distance, si_sdr, stft_distance


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
