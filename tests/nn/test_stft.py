import pytest
import torch

from foley.nn.stft import FramedSTFT


@pytest.mark.parametrize(("window", "hop"), [(960, 240), (480, 120), (64, 8)])
def test_inverse_returns_the_signal(window, hop):
    stft = FramedSTFT(window, hop)
    audio = torch.randn(2, 20 * hop)
    spectra = stft(audio)
    assert spectra.shape == (2, 20, window // 2 + 1)
    torch.testing.assert_close(stft.inverse(spectra), audio, atol=2e-5, rtol=0)


def test_agrees_with_torch():
    stft = FramedSTFT(64, 16)
    audio = torch.randn(1, 160)
    wanted = torch.stft(audio, 64, 16, window=torch.hann_window(64), return_complex=True, pad_mode="constant") / 8
    torch.testing.assert_close(stft(audio), wanted.transpose(1, 2)[:, 1:])


def test_a_tone_has_its_energy_in_its_bin():
    stft = FramedSTFT(64, 16)
    tone = torch.cos(2 * torch.pi * 8 / 64 * torch.arange(64.0 * 4))
    assert (stft(tone[None])[0, 4:-4].abs().argmax(-1) == 8).all()


def test_phases_are_found():
    """Of two tones and a click; more iterations come nearer, and the same signal comes every time."""
    stft = FramedSTFT(256, 64)
    time = torch.arange(64.0 * 40)
    audio = torch.sin(0.3 * time) + 0.5 * torch.sin(0.81 * time)
    audio[1200] += 4
    magnitude = stft(audio[None]).abs()

    def error(iterations: int) -> float:
        found = stft(stft.invert_magnitude(magnitude, iterations)).abs()
        return float((found - magnitude).norm() / magnitude.norm())

    assert error(60) < error(10) < error(1)
    assert error(60) < 0.1
    assert torch.equal(stft.invert_magnitude(magnitude, 5), stft.invert_magnitude(magnitude, 5))


def test_silence_stays_silent():
    stft = FramedSTFT(64, 16)
    assert torch.equal(stft.invert_magnitude(torch.zeros(2, 5, stft.bins), 4), torch.zeros(2, 80))


@pytest.mark.parametrize(("window", "hop"), [(100, 30), (64, 32)])
def test_windows_that_do_not_fit_the_hop_are_refused(window, hop):
    with pytest.raises(ValueError, match=f"window_samples {window} must be an even multiple of the hop, {hop}"):
        FramedSTFT(window, hop)


def test_full_scale_is_the_magnitude_of_a_full_sinusoid():
    stft = FramedSTFT(960, 240)
    tone = torch.sin(2 * torch.pi * 40 / 960 * torch.arange(9600.0))[None]
    assert stft(tone).abs().max().item() == pytest.approx(stft.full_scale, rel=1e-3)
