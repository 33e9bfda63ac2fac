"""The diffusion classifier: a denoiser that knows its captions names them; for one that ignores them all are alike."""

import pytest
import torch
from commands import load_command

from foley.diffusion.guidance import Conditioning
from foley.diffusion.process import DiffusionProcess

SCRIPT = load_command("script/score_text_use")
CLASSES = 3


class Knowing(torch.nn.Module):
    """Predicts v for a clean latent that is constant, at the value that its context names."""

    def __init__(self, listens: bool) -> None:
        super().__init__()
        self.listens = listens
        self.process = DiffusionProcess()

    def forward(self, noisy, timestep, context, context_mask):
        clean = torch.zeros_like(noisy) + (context[:, 0, :1, None] if self.listens else 0)
        alpha, sigma = (level[:, None, None] for level in self.process.levels(timestep))
        return alpha * (noisy - alpha * clean) / sigma - sigma * clean


@pytest.mark.parametrize("listens", [True, False])
def test_errors_name_the_caption_that_the_denoiser_knows(listens: bool) -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 0.0])  # the last caption is the empty one
    captions = Conditioning(values[:, None, None], torch.ones(4, 1, dtype=torch.bool))
    classes = torch.tensor([2, 0, 1])
    clean = values[classes][:, None, None].expand(3, 2, 5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    errors = SCRIPT["errors_by_caption"](Knowing(listens), DiffusionProcess(), clean, noise, 900, captions)
    summary = SCRIPT["summarise"](errors, classes)
    assert errors.shape == (3, CLASSES + 1)
    if listens:
        assert summary["accuracy"] == 1
        assert summary["error_right_caption"] == pytest.approx(0, abs=1e-6)
        assert summary["error_empty_caption"] > 0.1
    else:
        assert summary["error_right_caption"] == summary["error_empty_caption"]
