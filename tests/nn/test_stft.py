import pytest
import torch

from foley.nn.stft import FramedSTFT


@pytest.mark.parametrize(("window", "hop"), [(960, 240), (480, 240), (64, 8)])
def test_inverse_returns_the_signal(window, hop):
    stft = FramedSTFT(window, hop)
    audio = torch.randn(2, 20 * hop)
    spectra = stft(audio)
    assert spectra.shape == (2, 20, window // 2 + 1)
    torch.testing.assert_close(stft.inverse(spectra), audio, atol=2e-5, rtol=0)


def test_inverse_of_changed_spectra_keeps_the_length():
    stft = FramedSTFT(64, 16)
    spectra = torch.randn(1, 7, stft.bins, dtype=torch.complex64)
    assert stft.inverse(spectra).shape == (1, 7 * 16)


def test_a_tone_has_its_energy_in_its_bin():
    stft = FramedSTFT(64, 16)
    tone = torch.cos(2 * torch.pi * 8 / 64 * torch.arange(64.0 * 4))
    assert (stft(tone[None])[0, 4:-4].abs().argmax(-1) == 8).all()


def test_windows_that_do_not_fit_the_hop_are_refused():
    with pytest.raises(ValueError, match="window_samples 100 must be a multiple of twice the hop 30"):
        FramedSTFT(100, 30)
