"""Direct preference optimisation of a diffusion model: Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908).

A pair is two sounds of one prompt c, a winner x^w and a loser x^l. The model of Bradley and Terry explains it by a
reward, p(x^w > x^l) = sigmoid(r(c, x^w) - r(c, x^l)), and the policy that maximises a reward while it stays near a
frozen reference implies one: r = beta log(p_theta / p_ref) + constant. No reward need be known then: the likelihood of
the pairs is that of two models. Along a diffusion each log-likelihood is bounded by errors of noise predictions, and
with x_t = alpha_t x + sigma_t eps for winner and loser alike

    L = -E log sigmoid(-beta T omega(lambda_t) (
            |eps - eps_theta(x_t^w, t)|^2 - |eps - eps_ref(x_t^w, t)|^2
          - (|eps - eps_theta(x_t^l, t)|^2 - |eps - eps_ref(x_t^l, t)|^2)))             (14)

The paper takes omega for constant, and its code `beta T omega |.|^2` for `beta / 2` times the mean over the elements:
so does this one, whose beta is that of the published runs (2000 for SD 1.5, 5000 for SDXL). Winner and loser share t
and the noise, as in that code: what differs between them is then what differs between the sounds.

For other predictions than epsilon the error is that of what the network predicts, v or a velocity, which is (14) with
another omega: of v-prediction `alpha^2`, for an error of v is `alpha` times as large in the noise. `error="noise"` has
(14) as it stands.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from foley.core.numbers import POSITIVE, check_choice
from foley.diffusion.process import DiffusionProcess

ERRORS = ("prediction", "noise")


@dataclass(frozen=True)
class PairErrors:
    """Squared errors `[B]`, means over the elements, of the policy and of the frozen reference on B pairs."""

    winner: Tensor
    loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor

    @classmethod
    def of(cls, policy: Tensor, reference: Tensor) -> "PairErrors":
        """Of errors `[2 B]`, those of the winners first."""
        return cls(*policy.chunk(2), *reference.chunk(2))  # one pass of the network for both halves

    @property
    def winner_change(self) -> Tensor:
        """What the policy's error on the winner is above the reference's, `[B]`; below 0 it has become likelier."""
        return self.winner - self.reference_winner

    @property
    def loser_change(self) -> Tensor:
        """The same of the loser."""
        return self.loser - self.reference_loser


class DiffusionDPO:
    """Equation (14) of this module.

    Args:
        beta: how far a pair counts before the sigmoid saturates, which keeps the policy near the reference.
        error: of what the network predicts ("prediction"), or of the noise that this implies ("noise").

    Raises ValueError for a beta that is not positive and for another word.

    >>> import torch
    >>> same = torch.tensor([0.3, 0.5])
    >>> DiffusionDPO(beta=2000)(PairErrors(same, same, same, same))  # log 2: the policy is the reference
    tensor(0.6931)
    """

    def __init__(self, beta: float = 2000.0, error: str = "prediction") -> None:
        POSITIVE.check("task.objective.beta", beta)
        check_choice("task.objective.error", error, ERRORS)
        self.beta = beta
        self.error = error

    def __call__(self, errors: PairErrors) -> Tensor:
        """The loss `[]`."""
        return -logsigmoid(self.logits(errors)).mean()  # (14)

    def logits(self, errors: PairErrors) -> Tensor:
        """What the sigmoid of (14) is of, `[B]`: the difference of the implied rewards of winner and loser."""
        # A policy that is likelier on the winner than on the loser, each beside the reference, has a positive one.
        return -self.beta / 2 * (errors.winner_change - errors.loser_change)

    def residual(
        self,
        process: DiffusionProcess,
        prediction: Tensor,
        noisy: Tensor,
        clean: Tensor,
        noise: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """What is squared, `[B, C, L]`; `timestep [B]`, the others as the prediction."""
        if self.error == "noise":
            return process.to_noise(noisy, prediction, timestep) - noise  # eps_theta - eps
        return prediction - process.target(clean, noise, timestep)  # u_theta - v, of a flow
