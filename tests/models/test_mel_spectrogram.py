"""The vocoders' log-mel spectrogram against its definition, computed another way."""

import math

import numpy as np
import pytest
import torch

from foley.models.codec.mel_vae import MelSpectrogram


def slaney_mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear to 1 kHz (15 mel), then 27 mel for each factor of 6.4."""
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / math.log(6.4))


def slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


def reference(audio: np.ndarray, rate: int, lowest: float, highest: float) -> np.ndarray:
    """`[T]`, a multiple of 256, to `[80, T / 256]`: reflect, window, transform, triangles of area one, log."""
    padded = np.pad(audio, 384, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[start : start + 1024] * window for start in range(0, len(audio), 256)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)
    edges = slaney_hertz(np.linspace(*slaney_mel(np.array([lowest, highest])), 82))
    frequency = np.arange(513) * rate / 1024
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.clip(np.minimum((frequency - left) / (centre - left), (right - frequency) / (right - centre)), 0, 1)
    return np.log(np.maximum(2 / (right - left) * triangles @ magnitude.T, 1e-5))


@pytest.mark.parametrize(
    ("rate", "lowest", "highest"), [(16000, 0.0, None), (22050, 0.0, 8000.0), (16000, 125.0, 7600.0)]
)
def test_it_is_the_definition(rate: int, lowest: float, highest: float | None) -> None:
    audio = 0.3 * torch.randn(2, 1, 2560, generator=torch.Generator().manual_seed(0))
    mel = MelSpectrogram(rate, lowest_hz=lowest, highest_hz=highest)(audio)
    expected = [reference(item[0].double().numpy(), rate, lowest, highest or rate / 2) for item in audio]
    assert mel.shape == (2, 80, 10)
    torch.testing.assert_close(mel, torch.from_numpy(np.stack(expected)).float(), atol=2e-4, rtol=1e-4)


def test_silence_is_the_floor_and_a_sine_is_in_its_band() -> None:
    spectrogram = MelSpectrogram()
    # The smallest power is told apart from silence by no band: 3e-5 times the area of a triangle is below the floor.
    torch.testing.assert_close(spectrogram(torch.zeros(1, 1, 512)), torch.full((1, 80, 2), math.log(1e-5)))
    sine = torch.sin(2 * math.pi * 1000 * torch.arange(5120) / 16000)[None, None]
    centres = np.linspace(0, slaney_mel(np.array([8000.0]))[0], 82)[1:-1]
    assert int(spectrogram(sine)[0, :, 10].argmax()) == int(np.abs(centres - 15).argmin())


@pytest.mark.parametrize(("samples", "frames"), [(385, 2), (512, 2), (513, 3), (16000, 63)])
def test_a_frame_for_each_hop(samples: int, frames: int) -> None:
    audio = torch.randn(1, 1, samples)
    assert MelSpectrogram()(audio).shape == (1, 80, frames)


def test_decimal_logarithms_are_scaled_natural_ones() -> None:
    audio = torch.randn(1, 1, 2048)
    torch.testing.assert_close(MelSpectrogram(decimal_log=True)(audio) * math.log(10), MelSpectrogram()(audio))


def test_too_short_audio_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 384 samples, got 100"):
        MelSpectrogram()(torch.zeros(1, 1, 100))


def test_half_precision_around_it_changes_nothing_and_gradients_are_finite() -> None:
    spectrogram, audio = MelSpectrogram(), torch.zeros(1, 1, 1024, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mel = spectrogram(audio)
    assert mel.dtype == torch.float32
    mel.sum().backward()
    assert audio.grad is not None
    assert audio.grad.isfinite().all()
    assert not spectrogram.state_dict()


def test_its_constants_are_there_where_weights_are_not() -> None:
    with torch.device("meta"):
        built = MelSpectrogram()
    audio = torch.randn(1, 1, 1024)
    assert torch.equal(built(audio), MelSpectrogram()(audio))
