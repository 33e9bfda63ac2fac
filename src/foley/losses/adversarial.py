"""Adversarial losses over discriminators that return, for each scale, their feature maps with the logits last.

The discriminator learns to tell real from generated; the generator minimises what `generator` gives, and beside it the
distance of the hidden feature maps (`feature_matching`), which is what most of its gradient comes from.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, relu

FeatureMaps = Sequence[Sequence[Tensor]]
"""`maps[scale][layer]`, each `[B, ...]`; the last layer of a scale is its logits."""


class HingeLoss:
    """Hinge loss (Lim & Ye 2017): the discriminator stops pushing beyond a margin of 1.

    >>> real, generated = [[torch.tensor([2.0])]], [[torch.tensor([-0.5])]]
    >>> HingeLoss().discriminator(real, generated), HingeLoss().generator(generated)
    (tensor(0.5000), tensor(0.5000))
    """

    def discriminator(self, real: FeatureMaps, generated: FeatureMaps) -> Tensor:
        """What the discriminator minimises; a scalar, the mean over scales."""
        # max(0, 1 - D(x)) + max(0, 1 + D(y)), with the logits D of real x and generated y.
        return _mean_over_scales(lambda logits: relu(1 - logits), real) + _mean_over_scales(
            lambda logits: relu(1 + logits), generated
        )

    def generator(self, generated: FeatureMaps) -> Tensor:
        """What the codec minimises; a scalar, the mean over scales."""
        return _mean_over_scales(torch.neg, generated)  # -D(y), which has no margin


class LeastSquaresLoss:
    """LSGAN (Mao et al. 2017): logits are regressed to 1 for real and 0 for generated audio."""

    def discriminator(self, real: FeatureMaps, generated: FeatureMaps) -> Tensor:
        """What the discriminator minimises; a scalar, the mean over scales."""
        # In the same letters, (1 - D(x))^2 + D(y)^2.
        return _mean_over_scales(lambda logits: (1 - logits).square(), real) + _mean_over_scales(
            torch.square, generated
        )

    def generator(self, generated: FeatureMaps) -> Tensor:
        """What the codec minimises; a scalar, the mean over scales."""
        return _mean_over_scales(lambda logits: (1 - logits).square(), generated)  # (1 - D(y))^2


def feature_matching(real: FeatureMaps, generated: FeatureMaps) -> Tensor:
    """L1 between hidden feature maps, averaged over layers, then over scales (MelGAN; Kumar et al. 2019, eq. 3)."""
    scales = [
        # Real maps are an aim, which passes no gradient on; the logits, last, are left out.
        torch.stack([l1_loss(fake, true.detach()) for fake, true in zip(fakes[:-1], trues[:-1], strict=True)]).mean()
        for fakes, trues in zip(generated, real, strict=True)
    ]
    return torch.stack(scales).mean()


def _mean_over_scales(penalty: Callable[[Tensor], Tensor], maps: FeatureMaps) -> Tensor:
    # Each scale counts alike, however many logits it has.
    return torch.stack([penalty(scale[-1]).mean() for scale in maps]).mean()
