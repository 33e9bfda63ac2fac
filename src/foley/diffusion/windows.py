"""Long latents as overlapping windows of a length that the denoiser knows (MultiDiffusion, Bar-Tal et al. 2023).

At every evaluation the latent is cut into n windows, all are denoised in one batch, and the predictions are averaged
where windows overlap, so that all windows agree on what they share:

    prediction[l] = sum_i weight(l - start_i) window_i[l - start_i] / sum_i weight(l - start_i)

MultiDiffusion averages what the solver makes of each window. All solvers here are affine in the prediction, so that
averaging the prediction is the same, and leaves the solver one latent.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Cuts `num_frames` L into windows of W frames that overlap by at least `overlap_frames`, evenly spread.

    A window's weight falls off linearly to its ends.

    Raises ValueError unless `0 <= overlap_frames < window_frames <= num_frames`.

    Example:
        >>> windows = Windows(num_frames=1200, window_frames=500, overlap_frames=100)
        >>> windows.starts
        [0, 350, 700]
        >>> latent = torch.randn(2, 8, 1200)
        >>> windows.split(latent).shape
        torch.Size([6, 8, 500])
        >>> torch.allclose(windows.merge(windows.split(latent)), latent, atol=1e-5)
        True
    """

    num_frames: int
    window_frames: int
    overlap_frames: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_frames < self.window_frames <= self.num_frames:
            raise ValueError(
                f"windows of {self.window_frames} frames that overlap by {self.overlap_frames} do not cut up "
                f"{self.num_frames} frames: the overlap must be shorter than a window, and a window not too long"
            )

    @cached_property
    def starts(self) -> list[int]:
        """The first frame of each window; the last window ends with the latent."""
        # The last start, and the longest way from one start to the next.
        room, stride = self.num_frames - self.window_frames, self.window_frames - self.overlap_frames
        gaps = -(-room // stride)  # rounded up: as few windows as overlap by enough, then spread evenly
        return [index * room // gaps for index in range(gaps + 1)] if gaps else [0]

    @property
    def count(self) -> int:
        """The number n of windows."""
        return len(self.starts)

    def split(self, frames: Tensor) -> Tensor:
        """`[B, ..., L]` to `[n B, ..., W]`: all items' first windows, then all items' second ones."""
        return torch.cat([frames[..., start : start + self.window_frames] for start in self.starts])

    def repeat(self, rows: Tensor) -> Tensor:
        """Rows `[B, ...]` that hold for all of an item's windows, in the order of `split`."""
        return rows.repeat(self.count, *[1] * (rows.ndim - 1))

    def merge(self, windows: Tensor) -> Tensor:
        """The weighted average `[B, C, L]` of `[n B, C, W]`."""
        ramp = torch.arange(1, self.window_frames + 1, device=windows.device)  # 1 to W
        weight = torch.minimum(ramp, ramp.flip(0)).to(windows.dtype)  # [W], 1 at both ends and W / 2 in the middle
        parts = windows.chunk(self.count)  # n of [B, C, W]
        total = windows.new_zeros(*parts[0].shape[:-1], self.num_frames)
        weights = windows.new_zeros(self.num_frames)
        for start, part in zip(self.starts, parts, strict=True):
            frames = slice(start, start + self.window_frames)
            total[..., frames] += weight * part
            weights[frames] += weight
        return total / weights  # [B, C, L] over [L]; every frame lies in a window, so none is 0
