"""What a codec's reconstructions are compared with; each has a codec's `sample_rate_hz` and `reconstruct`."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import GriffinLim as PhaseSearch

from foley.checkpoint import CheckpointError


class GriffinLim(nn.Module):
    """A mel spectrogram and back: magnitudes by least squares, phases by Griffin and Lim (1984, with momentum).

    What a mel front end keeps where no vocoder was trained.

    Args:
        fft_size: window length in samples; the hop is a quarter of it.
        mel_bands: from 0 Hz to half the rate.
        iterations: of the phase search.
    """

    window: Tensor
    bands: Tensor
    inverse: Tensor

    def __init__(self, sample_rate_hz: int, fft_size: int = 1024, mel_bands: int = 80, iterations: int = 32) -> None:
        super().__init__()
        self.sample_rate_hz = sample_rate_hz
        self.fft_size = fft_size
        bands = melscale_fbanks(fft_size // 2 + 1, 0.0, sample_rate_hz / 2, mel_bands, sample_rate_hz)
        self.register_buffer("window", torch.hann_window(fft_size))
        self.register_buffer("bands", bands)
        self.register_buffer("inverse", torch.linalg.pinv(bands))
        self.phases = PhaseSearch(fft_size, iterations, hop_length=fft_size // 4, power=1.0, rand_init=False)

    def reconstruct(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` to the same shape."""
        padded = F.pad(audio[:, 0], (0, max(0, self.fft_size - audio.shape[-1])))
        spectrum = torch.stft(padded, self.fft_size, self.fft_size // 4, window=self.window, return_complex=True)
        mel = spectrum.abs().mT @ self.bands
        restored = self.phases((mel @ self.inverse).clamp(min=0).mT)
        length = audio.shape[-1]
        return F.pad(restored, (0, max(0, length - restored.shape[-1])))[:, None, :length]


class DescriptCodec(nn.Module):
    """The Descript Audio Codec (Kumar et al. 2023) with its published weights, `weights_24khz.pth` of its releases.

    Raises CheckpointError where the file is missing.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        from dac import DAC  # imports much: only where it is used

        if not Path(weights).is_file():
            raise CheckpointError(f"dac_weights={weights}: no such file; it is one of descript-audio-codec's releases")
        self.codec = DAC.load(weights).eval()
        self.sample_rate_hz = int(self.codec.sample_rate)

    def reconstruct(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` to the same shape."""
        padded = self.codec.preprocess(audio, self.sample_rate_hz)
        restored: Tensor = self.codec(padded, self.sample_rate_hz)["audio"]
        return restored[..., : audio.shape[-1]]
