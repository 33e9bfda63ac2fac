"""What the spectrograms of published extractors have in common."""

import torch
from torch import Tensor, nn


class PowerSpectrum(nn.Module):
    """Squared magnitudes `[B, frames, bins]` of `audio [B, T]`; `window` is centred in the transform."""

    window: Tensor

    def __init__(self, fft_samples: int, hop_samples: int, window: Tensor, centred: bool) -> None:
        super().__init__()
        self.fft_samples, self.hop_samples, self.centred = fft_samples, hop_samples, centred
        self.register_buffer("window", window, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        spectrum = torch.stft(
            audio,
            self.fft_samples,
            self.hop_samples,
            len(self.window),
            self.window,
            center=self.centred,
            return_complex=True,
        )
        return torch.view_as_real(spectrum).square().sum(dim=-1).transpose(1, 2)


def mel_triangles(bands: int, fft_samples: int, sample_rate_hz: int, lowest_hz: float, highest_hz: float) -> Tensor:
    """Filters `[bins, bands]` that are triangles over mel, as in Kaldi and VGGish; torchaudio's are over hertz."""
    bins = torch.linspace(0, sample_rate_hz / 2, fft_samples // 2 + 1, dtype=torch.float64)
    limits = torch.tensor([lowest_hz, highest_hz], dtype=torch.float64)
    low, high = _mel(limits).tolist()
    edges = torch.linspace(low, high, bands + 2, dtype=torch.float64)
    rise = (_mel(bins)[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - _mel(bins)[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp_min(0).float()


def _mel(hertz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hertz / 700)
