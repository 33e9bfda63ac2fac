"""A small Descript Audio Codec of random weights in the layout of the published files."""

from pathlib import Path

import torch
from dac import DAC

SIZES = {"encoder_dim": 4, "decoder_dim": 16, "n_codebooks": 3, "codebook_size": 16}
RATES = {  # the strides of the published models
    24000: {"encoder_rates": [2, 4, 5, 8], "decoder_rates": [8, 5, 4, 2]},
    44100: {"encoder_rates": [2, 4, 8, 8], "decoder_rates": [8, 8, 4, 2]},
}


def save_dac(path: Path, sample_rate_hz: int) -> DAC:
    """Write the weights and metadata of a model with latents of 64 channels and 3 codebooks of 8."""
    torch.manual_seed(0)
    model = DAC(**SIZES, **RATES[sample_rate_hz], sample_rate=sample_rate_hz).eval()
    model.save(path, package=False)
    return model
