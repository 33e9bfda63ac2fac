"""Short-time spectra whose frames divide the signal exactly: one for each hop."""

import torch
from torch import Tensor, nn

_SMALLEST_OVERLAP = 1e-3


class FramedSTFT(nn.Module):
    """Windowed spectra centred on each hop, and the least-squares inverse.

    The window is the square root of Hann's, in analysis and in synthesis.

    Args:
        window_samples: length of the window and of the transform, a multiple of twice the hop.
        hop_samples: between frames.

    Raises:
        ValueError: where the window is not a multiple of twice the hop.
    """

    window: Tensor

    def __init__(self, window_samples: int, hop_samples: int) -> None:
        super().__init__()
        if window_samples % (2 * hop_samples):
            raise ValueError(f"window_samples {window_samples} must be a multiple of twice the hop {hop_samples}")
        self.window_samples, self.hop_samples = window_samples, hop_samples
        self.margin = (window_samples - hop_samples) // 2
        self.register_buffer("window", torch.hann_window(window_samples).sqrt(), persistent=False)

    @property
    def bins(self) -> int:
        """Frequencies from zero to half the rate."""
        return self.window_samples // 2 + 1

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, N * hop]` to complex `[B, N, bins]`; zeros lie beyond the ends."""
        frames = nn.functional.pad(audio, (self.margin, self.margin)).unfold(-1, self.window_samples, self.hop_samples)
        return torch.fft.rfft(frames * self.window, norm="ortho")

    def inverse(self, spectra: Tensor) -> Tensor:
        """Complex `[B, N, bins]` to `[B, N * hop]`."""
        frames = torch.fft.irfft(spectra, n=self.window_samples, norm="ortho") * self.window
        ones = self.window.square().expand(1, spectra.shape[1], -1)
        return self._overlap_add(frames) / self._overlap_add(ones).clamp(min=_SMALLEST_OVERLAP)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """`[B, N, window]` to `[B, N * hop]`."""
        num_frames = frames.shape[1]
        length = (num_frames - 1) * self.hop_samples + self.window_samples
        summed = nn.functional.fold(
            frames.transpose(1, 2), (1, length), (1, self.window_samples), stride=(1, self.hop_samples)
        )
        return summed[:, 0, 0, self.margin : self.margin + num_frames * self.hop_samples]
