"""Overlapping windows: they cover everything, and a denoiser that looks at one frame at a time does not notice them."""

from itertools import pairwise

import pytest
import torch

from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, KnownLatent
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.diffusion.windows import Windows


@pytest.mark.parametrize(("frames", "window", "overlap"), [(20, 8, 3), (20, 20, 5), (21, 8, 0), (17, 16, 15)])
def test_windows_cover_all_frames_and_overlap_enough(frames: int, window: int, overlap: int) -> None:
    windows = Windows(frames, window, overlap)
    starts = windows.starts
    assert (starts[0], starts[-1] + window) == (0, frames)
    assert all(second - first <= window - overlap for first, second in pairwise(starts))


def test_merging_what_was_split_is_the_identity() -> None:
    windows, latent = Windows(23, 8, 3), torch.randn(2, 4, 23)
    assert windows.split(latent).shape == (2 * windows.count, 4, 8)
    torch.testing.assert_close(windows.merge(windows.split(latent)), latent)


def test_overlaps_are_averaged_with_the_weights_of_both_windows() -> None:
    windows = Windows(6, 4, 2)  # weights 1 2 2 1, and 1 2 2 1 two frames later
    merged = windows.merge(torch.tensor([0.0, 3.0])[:, None, None].expand(2, 1, 4))
    torch.testing.assert_close(merged[0, 0], torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 3.0]))


@pytest.mark.parametrize(("window", "overlap"), [(8, 8), (8, -1), (21, 3)])
def test_impossible_windows_are_refused(window: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="20 frames"):
        Windows(20, window, overlap)


class Pointwise(torch.nn.Module):
    """Sees each frame by itself, its item's text, and what is visible there."""

    latent_channels = 3

    def forward(self, noisy, timestep, context, context_mask=None, visible=None, hidden_mask=None):
        shift = (context * context_mask[..., None]).sum(dim=(1, 2))[:, None, None] + timestep[:, None, None] / 1000
        seen = 0 if visible is None else visible * ~hidden_mask[:, None]
        return torch.tanh(noisy + shift + seen)


@pytest.mark.parametrize("editing", [False, True])
def test_a_pointwise_denoiser_generates_the_same_in_windows(editing: bool) -> None:
    positive = Conditioning(torch.randn(2, 4, 5), torch.ones(2, 4, dtype=torch.bool))
    negative = Conditioning(torch.randn(1, 2, 5), torch.ones(1, 2, dtype=torch.bool))
    known = KnownLatent(torch.randn(1, 3, 20), (torch.arange(20) > 6)[None]) if editing else None

    def generate(windows: Windows | None) -> torch.Tensor:
        return generate_latents(
            Pointwise(), DiffusionProcess(), positive, negative, [0, 1], 20, ClassifierFreeGuidance(3.0),
            Solver("ddim", 4), known=known, windows=windows,
        )  # fmt: skip

    torch.testing.assert_close(generate(Windows(20, 8, 3)), generate(None), atol=1e-4, rtol=1e-4)
