"""Shapes, rates, padding and randomness of the waveform VAE; its discriminators."""

import pytest
import torch

from foley.core.components import build_component
from foley.core.seeding import torch_generator
from foley.models.codec.base import GaussianPosterior
from foley.models.codec.discriminators import DACDiscriminator, MultiScaleSTFTDiscriminator
from foley.models.codec.waveform_vae import WaveformVAE

CONFIG = {
    "_target_": "foley.models.codec.waveform_vae.WaveformVAE",
    "channels": 4,
    "multipliers": [1, 2, 2],
    "strides": [10, 6, 4],
    "num_units": [0, 1, 2],
    "latent_channels": 3,
}


@pytest.fixture
def codec() -> WaveformVAE:
    torch.manual_seed(0)
    return build_component(CONFIG).eval()


def test_rates_follow_from_the_strides(codec: WaveformVAE) -> None:
    assert (codec.hop_samples, codec.latent_channels, codec.sample_rate_hz) == (240, 3, 24000)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (240, 1), (241, 2), (960, 4)])
def test_any_length_is_padded_to_whole_frames(codec: WaveformVAE, samples: int, frames: int) -> None:
    audio = torch.randn(2, 1, samples)
    latent = codec.encode(audio)
    assert latent.shape == (2, 3, frames)
    assert codec.decode(latent).shape == (2, 1, frames * 240)
    padded = torch.nn.functional.pad(audio, (0, frames * 240 - samples))
    torch.testing.assert_close(codec.encode(padded), latent)


def test_encoding_is_the_mean_or_a_repeatable_draw(codec: WaveformVAE) -> None:
    audio = torch.randn(1, 1, 960)
    mean, scale = codec.encode_moments(audio)
    torch.testing.assert_close(codec.encode(audio), mean)
    first, again = (codec.encode(audio, torch_generator("test", 1)) for _ in range(2))
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    noise = torch.randn(mean.shape, generator=torch_generator("test", 1))
    torch.testing.assert_close(first, mean + noise * (torch.nn.functional.softplus(scale) + 1e-4))


def test_a_reconstruction_is_as_long_as_its_original(codec: WaveformVAE) -> None:
    audio = torch.randn(2, 1, 1001, generator=torch.Generator().manual_seed(3))
    restored = codec.reconstruct(audio)
    torch.testing.assert_close(restored, codec.decode(codec.encode(audio))[..., :1001])


@pytest.mark.parametrize("shape", [(1, 2, 480), (1, 480), (1, 1, 0)])
def test_audio_that_is_not_mono_is_refused(codec: WaveformVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mono"):
        codec.encode(torch.zeros(shape))


def test_stages_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry for each stage"):
        WaveformVAE(strides=(2, 4))


def test_kl_closed_form() -> None:
    mean, std = torch.full((2, 3, 5), 0.5), torch.full((2, 3, 5), 2.0)
    normal = torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), normal)
    torch.testing.assert_close(GaussianPosterior(mean, std).kl(), 2 * divergence.sum(1).mean())
    assert GaussianPosterior(torch.zeros(1, 2, 3), torch.ones(1, 2, 3)).kl() == 0


@pytest.mark.parametrize(
    "discriminator",
    [
        MultiScaleSTFTDiscriminator((160, 80), filters=2),
        DACDiscriminator(24000, periods=(7,), fft_sizes=(512,)),
    ],
)
def test_discriminators_give_feature_maps_per_scale(discriminator: torch.nn.Module) -> None:
    maps = discriminator(torch.randn(2, 1, 2400))
    assert len(maps) >= 2
    assert all(len(scale) > 2 and scale[-1].shape[:2] == (2, 1) for scale in maps)
