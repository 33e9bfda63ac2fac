"""Short-time spectra whose frames divide the signal exactly, and the phases that magnitudes leave open."""

import torch
from torch import Tensor, nn

_SMALLEST = 1e-8  # of magnitudes and weights that are divided by


class FramedSTFT(nn.Module):
    """Spectra centred on each hop, in an orthonormal transform, and the least-squares inverse.

    The window is Hann's, in analysis and in synthesis.

    Args:
        window_samples: length of the window and of the transform, an even multiple of the hop, at least four hops.
        hop_samples: between frames.

    Raises:
        ValueError: where window and hop do not fit.
    """

    window: Tensor

    def __init__(self, window_samples: int, hop_samples: int) -> None:
        super().__init__()
        if window_samples % (2 * hop_samples) or window_samples < 4 * hop_samples:
            raise ValueError(
                f"window_samples {window_samples} must be an even multiple of the hop, {hop_samples}, and four at least"
            )
        self.window_samples, self.hop_samples = window_samples, hop_samples
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    @property
    def bins(self) -> int:
        """Frequencies from zero to half the rate."""
        return self.window_samples // 2 + 1

    @property
    def full_scale(self) -> float:
        """The magnitude of a sinusoid between -1 and 1 in its own bin."""
        return float(self.window.sum()) / 2 / self.window_samples**0.5

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, N * hop]` to complex `[B, N, bins]`; frame n is centred on the end of hop n, zeros lie beyond."""
        # Frame n is centred on (n + 1) hop, so the first window begins half - hop samples before the signal.
        half = self.window_samples // 2
        frames = nn.functional.pad(audio, (half - self.hop_samples, half)).unfold(
            -1, self.window_samples, self.hop_samples
        )
        return torch.fft.rfft(frames * self.window, norm="ortho")  # [B, N, window] to [B, N, bins]

    def inverse(self, spectra: Tensor) -> Tensor:
        """Complex `[B, N, bins]` to `[B, N * hop]`."""
        return self._add_up(spectra) * self._weight(spectra.shape[1])

    def invert_magnitude(self, magnitude: Tensor, iterations: int, momentum: float = 0.99) -> Tensor:
        """Magnitudes `[B, N, bins]` to a signal `[B, N * hop]` that has them as nearly as `iterations` find.

        The fast Griffin-Lim algorithm (Perraudin et al. 2013). It starts from random phases, since equal ones make a
        click of every frame; they are the same ones each time and for each item.
        """
        weight = self._weight(magnitude.shape[1])  # [1, N * hop]
        turns = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(0)).to(magnitude)
        spectra = torch.polar(magnitude, 2 * torch.pi * turns.expand_as(magnitude))
        previous = torch.zeros_like(spectra)
        for _ in range(iterations):
            # t_n: the nearest spectrum that a signal has, found by going there and back.
            consistent = self(self._add_up(spectra) * weight)
            # c_n = t_n + momentum (t_n - t_{n-1}): on beyond it, which is what makes it fast.
            ahead = torch.lerp(previous, consistent, 1 + momentum)
            # The magnitudes asked for, at the phases found.
            power = ahead.real.square().addcmul_(ahead.imag, ahead.imag)  # abs() is far slower
            scale = power.clamp_min_(_SMALLEST**2).rsqrt_().mul_(magnitude)
            spectra, previous = ahead.mul_(scale), consistent
        return self._add_up(spectra) * weight

    def _add_up(self, spectra: Tensor) -> Tensor:
        """Complex `[B, N, bins]` to windowed frames, overlapped: `[B, N * hop]`, not yet divided by their weight."""
        return self._overlap(torch.fft.irfft(spectra, n=self.window_samples, norm="ortho") * self.window)

    def _weight(self, num_frames: int) -> Tensor:
        """`[1, N * hop]`: what makes the overlapping windows add up to one."""
        # Windowed twice, in analysis and in synthesis: dividing by the sum of squares is the least-squares inverse
        # (Griffin and Lim 1984).
        squares = self.window.square().expand(1, num_frames, -1)
        return self._overlap(squares).clamp(min=_SMALLEST).reciprocal()

    def _overlap(self, frames: Tensor) -> Tensor:
        """`[B, N, window]` to `[B, N * hop]`: the parts of a hop that each frame adds to, summed."""
        num_frames, parts = frames.shape[1], self.window_samples // self.hop_samples
        pieces = frames.unflatten(2, (parts, self.hop_samples))  # [B, N, parts, hop]
        total = frames.new_zeros(len(frames), num_frames + parts - 1, self.hop_samples)
        for index in range(parts):
            total[:, index : index + num_frames] += pieces[:, :, index]
        first = parts // 2 - 1  # what lies before the signal's start
        return total[:, first : first + num_frames].flatten(1)
