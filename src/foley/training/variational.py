"""What trainers of VAEs share: a draw of the posterior, its divergence as a term, and the spread of its means."""

from collections.abc import Callable

import torch
from torch import Tensor

from foley.models.vae.bottleneck import GaussianPosterior
from foley.training.adversarial import AdversarialTraining, Pair


class VariationalTraining(AdversarialTraining):
    """A VAE, with the term "kl" beside those of (reconstruction, original); see `AdversarialTraining`."""

    own_terms = frozenset({"kl"})

    def reconstruct(
        self,
        original: Tensor,
        posterior: GaussianPosterior,
        decode: Callable[[Tensor], Tensor],
        noise: torch.Generator | None,
    ) -> Pair:
        """`original` and what `decode` makes of a draw of its posterior, or of the mean where there is no noise."""
        latent = posterior.mean if noise is None else posterior.sample(noise)
        return Pair(original, decode(latent).float(), {"kl": posterior.kl()}, {"latent_std": posterior.mean.std()})
