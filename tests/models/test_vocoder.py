"""Anti-aliased activations in closed form; shapes, reach and discriminators of the vocoder."""

import math

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from mel_codec_parts import VOCODER
from scipy import signal

from foley.core.components import build_component
from foley.models.codec.discriminators import PatchDiscriminator, PeriodResolutionDiscriminator
from foley.models.codec.vocoder import AMPUnit, AntiAliasedSnake, BigVGAN, downsample, low_pass_filter, upsample


def sine(cycles_per_sample: float, length: int = 400) -> torch.Tensor:
    return torch.sin(2 * math.pi * cycles_per_sample * torch.arange(length, dtype=torch.float64) + 0.3)[None, None]


@pytest.fixture
def kernel() -> torch.Tensor:
    return low_pass_filter().double().expand(1, 1, -1)


@pytest.fixture
def vocoder() -> BigVGAN:
    torch.manual_seed(0)
    return build_component(VOCODER).eval()


def test_the_filter_is_symmetric_and_passes_a_constant() -> None:
    taps = low_pass_filter()
    torch.testing.assert_close(taps, taps.flip(0))
    assert float(taps.sum()) == pytest.approx(1, abs=1e-6)
    response = (taps * torch.cos(math.pi * (torch.arange(12) - 5.5))).sum()
    assert abs(float(response)) < 1e-3  # nothing passes at half the rate


def test_the_filter_follows_from_kaisers_formulas() -> None:
    window = signal.windows.kaiser(12, signal.kaiser_beta(signal.kaiser_atten(6, 4 * 0.3)))
    taps = window * np.sinc((np.arange(12) - 5.5) / 2)
    torch.testing.assert_close(low_pass_filter(), torch.from_numpy(taps / taps.sum()).float())


def test_a_constant_stays_what_it_is(kernel: torch.Tensor) -> None:
    constant = torch.full((1, 1, 20), 0.7, dtype=torch.float64)
    torch.testing.assert_close(downsample(upsample(constant, kernel), kernel), constant, atol=0.01, rtol=0)


@pytest.mark.parametrize("cycles_per_sample", [0.01, 0.05, 0.1])
def test_a_band_limited_sine_comes_back(kernel: torch.Tensor, cycles_per_sample: float) -> None:
    original = sine(cycles_per_sample)
    doubled = upsample(original, kernel)
    back = downsample(doubled, kernel)
    assert doubled.shape[-1] == 2 * original.shape[-1]
    torch.testing.assert_close(back[..., 20:-20], original[..., 20:-20], atol=0.02, rtol=0)
    # The samples of the higher rate lie a quarter of a sample before and after those of the lower one.
    time = torch.arange(800, dtype=torch.float64) / 2 - 0.25
    interpolated = torch.sin(2 * math.pi * cycles_per_sample * time + 0.3)[None, None]
    torch.testing.assert_close(doubled[..., 40:-40], interpolated[..., 40:-40], atol=0.02, rtol=0)


def test_snake_beta_of_a_constant() -> None:
    activation = AntiAliasedSnake(2).double()
    with torch.no_grad():
        activation.snake.log_alpha.copy_(torch.tensor([0.0, 0.7]))
        activation.snake.log_beta.copy_(torch.tensor([0.4, -0.2]))
    value = torch.tensor([0.5, -1.2], dtype=torch.float64)
    alpha, beta = torch.tensor([0.0, 0.7]).double().exp(), torch.tensor([0.4, -0.2]).double().exp()
    expected = value + (alpha * value).sin().square() / beta
    output = activation(value[None, :, None].expand(1, 2, 30))
    torch.testing.assert_close(output[0, :, 15], expected, atol=1e-2, rtol=1e-2)


def test_harmonics_beyond_the_rate_are_not_folded_back() -> None:
    """Of a sine at 0.15 cycles a sample, the sixth harmonic is at 0.9: it would fold back to 0.1."""
    activation, original = AntiAliasedSnake(1).double(), sine(0.15)
    with torch.no_grad():
        activation.snake.log_alpha.fill_(math.log(3.0))
        outputs = activation(original), activation.snake(original)
    filtered, plain = (float(torch.fft.rfft(each[0, 0, 100:300])[20].abs()) for each in outputs)
    assert filtered < 0.2 * plain


@pytest.mark.parametrize("convs_per_unit", [1, 2])
def test_the_vocoder_makes_a_hop_of_audio_for_each_frame(convs_per_unit: int) -> None:
    vocoder = build_component({**VOCODER, "convs_per_unit": convs_per_unit})
    audio = vocoder(torch.randn(2, 80, 9))
    assert audio.shape == (2, 1, 9 * 256)
    assert audio.abs().max() <= 1
    units = [module for module in vocoder.modules() if isinstance(module, AMPUnit)]
    assert {len(unit.layers) for unit in units} == {2 * convs_per_unit}


def test_clipping_instead_of_tanh(vocoder: BigVGAN) -> None:
    mel = torch.randn(1, 80, 4)
    loud = vocoder(mel).atanh()
    vocoder.final_tanh = False
    torch.testing.assert_close(vocoder(mel), loud.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_a_frame_hears_no_further_than_the_context(vocoder: BigVGAN) -> None:
    context = vocoder.context_frames
    frame = context + 2
    mel = torch.randn(1, 80, 2 * frame + 1).double().requires_grad_()
    vocoder.double()(mel)[..., frame * 256 : (frame + 1) * 256].square().sum().backward()
    assert mel.grad is not None
    heard = mel.grad[0].abs().sum(0).nonzero()[:, 0]
    assert 0 < max(frame - int(heard[0]), int(heard[-1]) - frame) <= context


def test_strides_must_make_the_hop() -> None:
    with pytest.raises(InstantiationException, match="multiply to the hop of 256"):
        build_component({**VOCODER, "strides": [8, 8]})


def test_discriminators_give_feature_maps_per_scale() -> None:
    maps = PeriodResolutionDiscriminator((2, 3), ((512, 50, 240),), filters=1)(torch.randn(2, 1, 2001))
    assert [len(scale) for scale in maps] == [6, 6, 6]
    assert [tuple(scale[-1].shape[:2]) for scale in maps] == [(2, 1)] * 3
    assert [scale[-1].shape[-1] for scale in maps[:2]] == [2, 3]
    (patches,) = PatchDiscriminator(2, 2)(torch.randn(2, 80, 32))
    assert [tuple(hidden.shape[1:]) for hidden in patches] == [(2, 40, 16), (4, 20, 8), (8, 19, 7), (1, 18, 6)]
