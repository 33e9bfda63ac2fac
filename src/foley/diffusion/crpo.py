"""CLAP-ranked preference optimisation: CRPO (Hung et al. 2024, TangoFlux, arXiv:2412.21037, sections 3.3 and 3.4).

Preferences that nobody gave: in each of some rounds the model itself makes N sounds of every prompt, a reward ranks
them (the paper's is CLAP's cosine of sound and prompt), and the best and the worst of a prompt are a pair. The model of
the round, frozen, is the reference; what it has been tuned to begins the next round.

Diffusion-DPO holds for a flow with velocities u in the place of the noise, and v = noise - x their target:

    L_DPO-FM = -E log sigmoid(-beta (|u_theta(x_t^w) - v^w|^2 - |u_theta(x_t^l) - v^l|^2
                                   - (|u_ref(x_t^w) - v^w|^2 - |u_ref(x_t^l) - v^l|^2)))

Only differences count there: it falls, too, where the errors on winners grow, if those on losers grow faster. So the
objective of ordinary training on the winner holds it up:

    L_CRPO = L_DPO-FM + L_FM          L_FM = E |u_theta(x_t^w) - v^w|^2

Systems that predict v or epsilon take the same, with their own target.
"""

from collections.abc import Sequence

from torch import Tensor

from foley.core.numbers import NOT_NEGATIVE
from foley.diffusion.dpo import DiffusionDPO, PairErrors


def best_and_worst(rewards: Sequence[float], least_gap: float = 0.0) -> tuple[int, int] | None:
    """Which of the N sounds of a prompt are the pair, winner first; None where all are about as good.

    Args:
        rewards: of each sound; of equal ones the first.
        least_gap: a pair's rewards differ by more than that.

    >>> best_and_worst([0.2, 0.5, 0.1]), best_and_worst([0.2, 0.2]), best_and_worst([0.2])
    ((1, 2), None, None)
    """
    if len(rewards) < 2:  # the others of the prompt failed, or only one was asked for
        return None
    places = range(len(rewards))
    winner, loser = max(places, key=rewards.__getitem__), min(places, key=rewards.__getitem__)
    # Below the gap a reward says more of its own noise than of the sounds.
    return (winner, loser) if rewards[winner] - rewards[loser] > least_gap else None


class CRPO(DiffusionDPO):
    """L_CRPO of this module.

    Args:
        beta, error: as for `DiffusionDPO`; the paper's beta is 2000.
        winner_weight: of L_FM, in the paper 1.

    Raises ValueError as `DiffusionDPO` does, and for a weight below 0.

    >>> import torch
    >>> winner, loser = torch.tensor([0.3]), torch.tensor([0.5])
    >>> CRPO()(PairErrors(winner, loser, winner, loser))  # log 2 + 0.3
    tensor(0.9931)
    """

    def __init__(self, beta: float = 2000.0, error: str = "prediction", winner_weight: float = 1.0) -> None:
        super().__init__(beta, error)
        NOT_NEGATIVE.check("task.objective.winner_weight", winner_weight)
        self.winner_weight = winner_weight

    def __call__(self, errors: PairErrors) -> Tensor:
        """The loss `[]`."""
        return super().__call__(errors) + self.winner_weight * errors.winner.mean()  # L_DPO-FM + L_FM
