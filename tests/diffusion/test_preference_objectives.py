"""DPO and CRPO as functions of four errors: their values where these are known, their gradients, and beta's limits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from foley.core.seeding import torch_generator
from foley.diffusion.crpo import CRPO, best_and_worst
from foley.diffusion.dpo import DiffusionDPO, PairErrors
from foley.diffusion.process import DiffusionProcess

OBJECTIVES = [DiffusionDPO, CRPO]


def errors_of(winner: float, loser: float, reference_winner: float, reference_loser: float) -> PairErrors:
    return PairErrors(*(torch.tensor([value]) for value in (winner, loser, reference_winner, reference_loser)))


@pytest.mark.parametrize("beta", [1e-3, 1.0, 2000.0])
def test_it_is_log_2_where_the_policy_is_the_reference(beta: float) -> None:
    same = errors_of(0.3, 0.7, 0.3, 0.7)
    assert float(DiffusionDPO(beta)(same)) == pytest.approx(math.log(2))
    assert float(CRPO(beta)(same)) == pytest.approx(math.log(2) + 0.3)


def test_it_is_equation_14_with_beta_over_two_in_the_place_of_beta_t_omega() -> None:
    errors = errors_of(0.30, 0.71, 0.31, 0.70)
    bracket = (0.30 - 0.31) - (0.71 - 0.70)
    assert float(DiffusionDPO(100.0)(errors)) == pytest.approx(math.log(1 + math.exp(50 * bracket)), rel=1e-5)
    assert float(DiffusionDPO(100.0).logits(errors)) == pytest.approx(-50 * bracket, rel=1e-5)


def test_crpo_is_dpo_and_the_winners_own_loss() -> None:
    policy, reference = torch.rand(2, 8, generator=torch_generator("errors"))
    errors = PairErrors.of(policy, reference)
    assert torch.equal(errors.winner, policy[:4])
    assert torch.equal(errors.reference_loser, reference[4:])
    torch.testing.assert_close(CRPO(50.0)(errors), DiffusionDPO(50.0)(errors) + errors.winner.mean())
    torch.testing.assert_close(
        CRPO(50.0, winner_weight=0.5)(errors), DiffusionDPO(50.0)(errors) + errors.winner.mean() / 2
    )
    assert torch.equal(CRPO(50.0, winner_weight=0.0)(errors), DiffusionDPO(50.0)(errors))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_winners_error_is_pushed_down_and_the_losers_up(objective: type[DiffusionDPO]) -> None:
    policy = torch.tensor([0.3, 0.5, 0.7, 0.2], requires_grad=True)
    objective(20.0)(PairErrors.of(policy, torch.full((4,), 0.4))).backward()
    assert policy.grad is not None
    assert (policy.grad[:2] > 0).all()
    assert (policy.grad[2:] < 0).all()


def test_a_small_beta_weighs_all_pairs_alike_and_a_large_one_those_that_are_wrong() -> None:
    def gradient(beta: float) -> Tensor:
        winner = torch.tensor([0.30, 0.40], requires_grad=True)  # the reference's is 0.35: right, and wrong
        same = torch.tensor([0.35, 0.35])
        (DiffusionDPO(beta)(PairErrors(winner, same, same, same)) / beta).backward()
        assert winner.grad is not None
        return winner.grad

    # d/dw of -log sigmoid(-beta/2 x) is beta/2 sigmoid(beta/2 x): half of it at beta = 0, a step at infinity.
    torch.testing.assert_close(gradient(1e-4), torch.full((2,), 1 / 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient(1e5), torch.tensor([0.0, 1 / 4]))


def test_large_margins_neither_overflow_nor_lose_their_gradient() -> None:
    winner = torch.tensor([10.0], requires_grad=True)
    loss = DiffusionDPO(5000.0)(PairErrors(winner, *torch.tensor([[0.1], [0.1], [0.1]])))
    loss.backward()
    assert loss.isfinite()
    assert winner.grad == 2500


@pytest.mark.parametrize("prediction", ["v", "epsilon", "flow", "x0"])
def test_the_error_of_the_noise_is_that_of_the_prediction_in_other_units(prediction: str) -> None:
    process = DiffusionProcess(prediction, zero_terminal_snr=False)
    timestep = torch.tensor([100, 400, 900])
    clean, noise, off = torch.randn(3, 3, 4, 12, generator=torch_generator("latents"))
    noisy = process.add_noise(clean, noise, timestep)
    given = process, process.target(clean, noise, timestep) + 0.1 * off, noisy, clean, noise, timestep
    own = DiffusionDPO(error="prediction").residual(*given)
    torch.testing.assert_close(own, 0.1 * off, atol=1e-4, rtol=1e-4)
    alpha, sigma = process.levels(timestep)
    factor = {"v": alpha, "epsilon": torch.ones(3), "flow": alpha, "x0": -alpha / sigma}[prediction]
    of_noise = DiffusionDPO(error="noise").residual(*given)
    torch.testing.assert_close(of_noise, factor[:, None, None] * own, atol=1e-3, rtol=1e-3)


def test_v_in_the_noise_is_epsilon_of_the_same_network() -> None:
    """A network that predicts v implies one that predicts the noise: (14) does not tell them apart."""
    v, epsilon = DiffusionProcess("v", zero_terminal_snr=False), DiffusionProcess("epsilon", zero_terminal_snr=False)
    timestep = torch.tensor([20, 500, 990])
    clean, noise, off = torch.randn(3, 3, 4, 12, generator=torch_generator("latents"))
    noisy = v.add_noise(clean, noise, timestep)
    predicted_v = v.target(clean, noise, timestep) + 0.2 * off
    implied = v.to_noise(noisy, predicted_v, timestep)
    objective = DiffusionDPO(error="noise")
    torch.testing.assert_close(
        objective.residual(v, predicted_v, noisy, clean, noise, timestep),
        DiffusionDPO().residual(epsilon, implied, noisy, clean, noise, timestep),
    )


def test_the_best_and_the_worst_are_the_pair() -> None:
    assert best_and_worst([0.1, -2.0, 3.0, 3.0, 0.0]) == (2, 1)
    assert best_and_worst([1.0, 0.5], least_gap=0.5) is None
    assert best_and_worst([1.0, 0.49], least_gap=0.5) == (0, 1)
    assert best_and_worst([]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "task.objective.beta=0.0"),
        ({"error": "sound"}, "task.objective.error must be one of prediction, noise, got 'sound'"),
        ({"winner_weight": -1.0}, "task.objective.winner_weight=-1.0"),
    ],
)
def test_what_it_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRPO(**options)


def test_it_agrees_with_the_logistic_likelihood_of_bradley_and_terry() -> None:
    """The sum over both outcomes of a pair is 1: swapping winner and loser negates the logit."""
    errors = PairErrors.of(*torch.rand(2, 8, generator=torch_generator("errors")))
    swapped = PairErrors(errors.loser, errors.winner, errors.reference_loser, errors.reference_winner)
    objective = DiffusionDPO(3.0)
    torch.testing.assert_close(objective.logits(swapped), -objective.logits(errors))
    both = logsigmoid(objective.logits(errors)).exp() + logsigmoid(objective.logits(swapped)).exp()
    torch.testing.assert_close(both, torch.ones(4))
