"""Closed forms of the codec's and the denoiser's losses."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foley.losses.adversarial import HingeLoss, LeastSquaresLoss, feature_matching
from foley.losses.regression import huber, masked_mse, pseudo_huber
from foley.losses.spectral import LogMelLoss, MultiResolutionSTFTLoss, a_weighting


def test_a_weighting_at_the_standard_frequencies() -> None:
    decibels = 20 * a_weighting(torch.tensor([100.0, 1000.0, 10000.0])).log10()
    torch.testing.assert_close(decibels, torch.tensor([-19.1, 0.0, -2.5]), atol=0.06, rtol=0)
    assert a_weighting(torch.zeros(1)) == 0


def test_stft_loss_of_a_scaled_signal() -> None:
    loss = MultiResolutionSTFTLoss(24000, (320, 80), floor=1e-12)
    audio = torch.randn(2, 1, 2400)
    assert loss(audio, audio) == 0
    # Half the amplitude: spectral convergence 1/2, and log 2 in every bin but that of 0 Hz, whose weight is 0.
    counted = (160 / 161 + 40 / 41) / 2
    assert loss(0.5 * audio, audio).item() == pytest.approx(0.5 + counted * math.log(2), rel=1e-4)


@pytest.mark.parametrize("loss", [MultiResolutionSTFTLoss(24000, (320,)), LogMelLoss(24000, 512, 40)])
def test_silence_has_finite_loss_and_gradient(loss: torch.nn.Module) -> None:
    silence = torch.zeros(1, 1, 1200, requires_grad=True)
    value = loss(silence, torch.zeros(1, 1, 1200))
    value.backward()
    assert value == 0
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


def test_spectral_losses_keep_no_state() -> None:
    assert not MultiResolutionSTFTLoss(24000).state_dict()
    assert not LogMelLoss(24000).state_dict()


def test_log_mel_loss_of_a_scaled_signal() -> None:
    loss = LogMelLoss(24000, 1024, 20, floor=1e-9)
    audio = torch.randn(1, 1, 4800)
    assert loss(3 * audio, audio).item() == pytest.approx(math.log(3), rel=1e-4)


def test_adversarial_losses_closed_forms() -> None:
    real, fake = [[torch.zeros(1), torch.full((2,), 0.25)]], [[torch.ones(1), torch.full((2,), -0.5)]]
    assert HingeLoss().discriminator(real, fake).item() == pytest.approx(0.75 + 0.5)
    assert HingeLoss().generator(fake).item() == pytest.approx(0.5)
    assert LeastSquaresLoss().discriminator(real, fake).item() == pytest.approx(0.5625 + 0.25)
    assert LeastSquaresLoss().generator(fake).item() == pytest.approx(2.25)
    assert LeastSquaresLoss(linear_generator=True).generator(fake).item() == pytest.approx(0.5)
    assert feature_matching(real, fake).item() == pytest.approx(1.0)


def test_masked_mse_counts_valid_frames_only() -> None:
    prediction, target = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    prediction[~mask[:, None].expand_as(prediction)] = torch.nan
    assert masked_mse(prediction, target, mask) == 1
    assert masked_mse(prediction, target, torch.zeros_like(mask)) == 0


def test_pseudo_huber_golden(shared: Path) -> None:
    golden = load_file(shared / "golden" / "audiolcm.safetensors")
    loss = pseudo_huber(golden["loss.pred"], golden["loss.target"], 1e-3)
    torch.testing.assert_close(loss, golden["loss.pseudo_huber_c0.001"].squeeze())


def test_huber_is_quadratic_then_linear() -> None:
    prediction = torch.tensor([0.0, 0.5, -1.0, 3.0]).reshape(1, 1, 4)
    losses = [0.0, 0.125, 0.5, 2.5]
    for frame, expected in enumerate(losses):
        mask = torch.arange(4)[None] == frame
        assert huber(prediction, torch.zeros(1, 1, 4), eta=1.0, mask=mask).item() == pytest.approx(expected)
    assert huber(prediction, torch.zeros(1, 1, 4)).item() == pytest.approx(sum(losses) / 4)
