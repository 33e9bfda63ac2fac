"""The fast decoder gives what the decoder gives, and knows how far the decoder hears."""

import pytest
import torch

from foley.models.codec.fast_decoder import FastDecoder
from foley.models.codec.waveform_vae import WaveformVAE

SIZES = [
    {"channels": 4, "multipliers": (1, 2, 2), "strides": (10, 6, 4), "num_units": (0, 1, 2)},
    {"channels": 16, "multipliers": (1, 2, 4, 8), "strides": (2, 4, 6, 10), "num_units": (3, 3, 3, 3)},
    {"channels": 4, "multipliers": (1, 2, 2, 2), "strides": (8, 5, 4, 2), "num_units": (1, 1, 1, 0)},  # as EnCodec's
    {"channels": 4, "multipliers": (1, 2), "strides": (3, 7), "num_units": (1, 1)},
]


@pytest.fixture(params=SIZES, ids=["few_units", "published_layers", "encodec", "odd"])
def codec(request: pytest.FixtureRequest) -> WaveformVAE:
    torch.manual_seed(0)
    codec = WaveformVAE(latent_channels=6, **request.param).eval()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if "log_" in name or name.endswith("bias"):
                parameter.normal_(std=0.3)
    return codec


@pytest.mark.parametrize("frames", [1, 7, 40])
def test_it_decodes_alike(codec: WaveformVAE, frames: int) -> None:
    latent = torch.randn(2, 6, frames)
    expected = codec.decode(latent)
    audio = FastDecoder(codec.decoder)(latent)
    assert audio.shape == expected.shape
    assert expected.std() > 0.05
    torch.testing.assert_close(audio, expected, atol=1e-4, rtol=0)


def test_in_double_precision_it_is_the_same(codec: WaveformVAE) -> None:
    latent = torch.randn(1, 6, 9).double()
    codec.double()
    torch.testing.assert_close(FastDecoder(codec.decoder)(latent), codec.decode(latent), atol=1e-11, rtol=1e-11)


def test_the_context_is_what_a_frame_hears(codec: WaveformVAE) -> None:
    context = codec.decoder.context_frames
    frame, hop = context + 2, codec.hop_samples
    latent = torch.randn(1, 6, 2 * frame + 1).double().requires_grad_()
    codec.double().decode(latent)[..., frame * hop : (frame + 1) * hop].square().sum().backward()
    assert latent.grad is not None
    heard = latent.grad[0].abs().sum(0).nonzero()[:, 0]
    assert max(frame - int(heard[0]), int(heard[-1]) - frame) == context
