import pytest
import torch
from diffusers import DDIMScheduler

from foley.core.seeding import torch_generator
from foley.diffusion.process import PREDICTIONS, DiffusionProcess


def make(prediction: str) -> DiffusionProcess:
    return DiffusionProcess(prediction, zero_terminal_snr=prediction != "epsilon")


def timesteps(process: DiffusionProcess) -> torch.Tensor:
    return torch.tensor([250.0, 500.0, 900.0]) if process.is_flow else torch.tensor([10, 500, 900])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_back_clean_and_noise(prediction):
    process = make(prediction)
    clean, noise = torch.randn(2, 3, 4, 20, generator=torch_generator("process")).unbind()
    at = timesteps(process)
    noisy, target = process.add_noise(clean, noise, at), process.target(clean, noise, at)
    torch.testing.assert_close(process.to_clean(noisy, target, at), clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(process.to_noise(noisy, target, at), noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_have_their_textbook_forms(prediction):
    process = make(prediction)
    clean, noise = torch.randn(2, 3, 4, 20, generator=torch_generator("targets")).unbind()
    at = timesteps(process)
    alpha, sigma = (level[:, None, None] for level in process.levels(at))
    expected = {"v": alpha * noise - sigma * clean, "epsilon": noise, "x0": clean, "flow": noise - clean}
    torch.testing.assert_close(process.target(clean, noise, at), expected[prediction])


@pytest.mark.parametrize("rescale", [True, False])
def test_schedule_is_that_of_diffusers(rescale):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=rescale
    )
    process = DiffusionProcess(zero_terminal_snr=rescale)
    torch.testing.assert_close(process.alphas_cumprod.float(), scheduler.alphas_cumprod, atol=1e-6, rtol=0)


def test_zero_terminal_snr_is_exact():
    process = DiffusionProcess("v")
    clean, noise = torch.randn(2, 1, 4, 20, generator=torch_generator("terminal")).unbind()
    last = torch.tensor([999])
    assert process.snr(last).item() == 0
    torch.testing.assert_close(process.add_noise(clean, noise, last), noise, atol=0, rtol=0)


def test_flow_is_a_straight_line():
    process = DiffusionProcess("flow")
    clean, noise = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    assert process.add_noise(clean, noise, torch.tensor([300.0])).item() == pytest.approx(0.3)
    assert process.snr(torch.tensor([500.0])).item() == pytest.approx(1.0)


def test_min_snr_weights_have_their_published_forms():
    at = torch.tensor([10, 500, 900])
    snr = DiffusionProcess("v", zero_terminal_snr=False).snr(at)
    capped = snr.clamp(max=5.0)
    expected = {"x0": capped, "epsilon": capped / snr, "v": capped / (snr + 1)}
    for prediction, weight in expected.items():
        process = DiffusionProcess(prediction, zero_terminal_snr=False)
        torch.testing.assert_close(process.min_snr_weight(at, 5.0), weight, rtol=1e-4, atol=1e-6)


def test_min_snr_weight_is_finite_at_the_noisiest_step():
    assert DiffusionProcess("v").min_snr_weight(torch.tensor([0, 999])).isfinite().all()


def test_logit_normal_times_have_normal_logits_and_are_flows_alone():
    process = DiffusionProcess("flow", logit_normal=(-0.5, 0.8))
    drawn = process.sample_timesteps(20_000, torch_generator("timesteps")) / process.num_train_steps
    assert drawn.logit().mean().item() == pytest.approx(-0.5, abs=0.02)
    assert drawn.logit().std().item() == pytest.approx(0.8, abs=0.02)
    with pytest.raises(ValueError, match="is flow's alone"):
        DiffusionProcess("v", logit_normal=(0.0, 1.0))


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_timesteps_are_uniform_and_repeatable(prediction):
    process = make(prediction)
    drawn = process.sample_timesteps(20_000, torch_generator("timesteps", 1))
    assert torch.equal(drawn, process.sample_timesteps(20_000, torch_generator("timesteps", 1)))
    assert drawn.float().mean().item() == pytest.approx(500, rel=0.02)
    assert drawn.min() >= 0
    assert drawn.max() < 1000


def test_impossible_processes_are_refused():
    with pytest.raises(ValueError, match="epsilon cannot be sampled"):
        DiffusionProcess("epsilon")
    with pytest.raises(ValueError, match="'velocity'"):
        DiffusionProcess("velocity")
