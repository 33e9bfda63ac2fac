"""The losses of the Descript Audio Codec's package, and which of ours are the same."""

import math
from types import SimpleNamespace

import pytest
import torch
from dac.model.discriminator import MPD
from dac.nn.loss import GANLoss

from foley.losses.adversarial import LeastSquaresLoss
from foley.losses.dac import DACMelLoss, DACSTFTLoss
from foley.models.codec.discriminators import PeriodDiscriminator


@pytest.fixture
def noise():
    return torch.randn(2, 1, 4800, generator=torch.Generator().manual_seed(0))


def test_half_the_amplitude_is_as_far_as_its_logarithm_says(noise):
    mel = DACMelLoss(24000, mel_bands=(5, 10), window_lengths=(256, 512))
    assert mel(noise, noise) == 0
    assert mel(0.5 * noise, noise).item() == pytest.approx(2 * math.log10(2), rel=1e-4)  # of two scales
    stft = DACSTFTLoss(24000, window_lengths=(512,))
    magnitude = stft(0.5 * noise, noise).item() - 2 * math.log10(2)  # the logarithm is of squares
    half = stft(0.25 * noise, 0.5 * noise).item() - 2 * math.log10(2)
    assert magnitude == pytest.approx(2 * half, rel=1e-3)


def test_gradients_reach_the_prediction_alone(noise):
    prediction = noise.roll(1, -1).requires_grad_()
    DACMelLoss(24000, mel_bands=(5,), window_lengths=(256,))(prediction, noise).backward()
    assert prediction.grad.abs().sum() > 0


def test_the_published_adversarial_loss_is_ours_times_the_number_of_discriminators():
    maps = {key: [[torch.randn(2, 3), torch.randn(2, 1, 4 + scale)] for scale in range(3)] for key in ("fake", "real")}

    class Signal(SimpleNamespace):
        def clone(self):
            return self

        detach = clone

    fake, real = Signal(audio_data="fake"), Signal(audio_data="real")
    published, own = GANLoss(maps.__getitem__), LeastSquaresLoss()
    torch.testing.assert_close(
        published.discriminator_loss(fake, real), 3 * own.discriminator(maps["real"], maps["fake"])
    )
    torch.testing.assert_close(published.generator_loss(fake, real)[0], 3 * own.generator(maps["fake"]))


@torch.no_grad()
def test_our_period_discriminator_is_the_published_one_but_where_the_period_divides_the_clip():
    """BigVGAN, whose it is, pads nothing there; DAC's a whole period."""
    published, own = MPD(3), PeriodDiscriminator(3, filters=32)
    weights = [tensor for layer in own.layers for tensor in layer.state_dict().values()]
    names = [*(f"convs.{index}.0" for index in range(5)), "conv_post"]
    theirs = [published.state_dict()[f"{name}.{part}"] for name in names for part in ("bias", "weight_g", "weight_v")]
    for tensor, value in zip(weights, theirs, strict=True):
        tensor.copy_(value)
    for samples, same in ((100, True), (99, False)):
        audio = torch.randn(1, 1, samples)
        maps = list(zip(own(audio), published(audio), strict=True))
        assert all(first.shape == second.shape and first.allclose(second, atol=1e-5) for first, second in maps) is same
