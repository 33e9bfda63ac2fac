"""Adversarial losses over discriminators that return, for each scale, their feature maps with the logits last.

The discriminator learns to tell real from generated; the generator minimises what `generator` gives, and beside it the
distance of the hidden feature maps (`feature_matching`), which is what most of its gradient comes from.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, relu

_SMALLEST_NORM = 1e-4  # no division by the norm of a gradient that has vanished; VQGAN's

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
    """LSGAN (Mao et al. 2017): logits are regressed to 1 for real and 0 for generated audio.

    Args:
        linear_generator: the generator minimises the negated logits, as that of `HingeLoss` and of AudioLCM's mel VAE.
    """

    def __init__(self, linear_generator: bool = False) -> None:
        self.linear_generator = linear_generator

    def discriminator(self, real: FeatureMaps, generated: FeatureMaps) -> Tensor:
        """What the discriminator minimises; a scalar, the mean over scales."""
        # In the same letters, (1 - D(x))^2 + D(y)^2.
        return _mean_over_scales(lambda logits: (1 - logits).square(), real) + _mean_over_scales(
            torch.square, generated
        )

    def generator(self, generated: FeatureMaps) -> Tensor:
        """What the codec minimises; a scalar, the mean over scales."""
        if self.linear_generator:
            return _mean_over_scales(torch.neg, generated)  # -D(y)
        return _mean_over_scales(lambda logits: (1 - logits).square(), generated)  # (1 - D(y))^2


def feature_matching(real: FeatureMaps, generated: FeatureMaps) -> Tensor:
    """L1 between hidden feature maps, averaged over layers, then over scales (MelGAN; Kumar et al. 2019, eq. 3)."""
    scales = [
        # Real maps are an aim, which passes no gradient on; the logits, last, are left out.
        torch.stack([l1_loss(fake, true.detach()) for fake, true in zip(fakes[:-1], trues[:-1], strict=True)]).mean()
        for fakes, trues in zip(generated, real, strict=True)
    ]
    return torch.stack(scales).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor, largest: float) -> Tensor:
    """What makes an adversarial loss pull as hard as the reconstruction does (VQGAN; Esser et al. 2021, equation 7).

        lambda = |d reconstruction / d w| / (|d adversarial / d w| + 1e-4), w the last layer of the decoder

    `[]`, a constant to gradients, and at most `largest`.

    >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> adaptive_weight(weight.square().sum(), 2 * weight.sum(), weight, largest=10.0)  # 10 / (2 sqrt(2) + 1e-4)
    tensor(3.5354)
    """
    ours, theirs = (
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (ours / (theirs + _SMALLEST_NORM)).clamp(max=largest)


def gradient_penalty(real: FeatureMaps, original: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): the mean square of the logits' gradient at the originals, which must require one.

    >>> original = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> gradient_penalty([[3 * original]], original)
    tensor(9.)
    """
    logits = torch.stack([scale[-1].sum() for scale in real]).sum()
    (gradient,) = torch.autograd.grad(logits, original, create_graph=True)
    return gradient.square().mean()


def _mean_over_scales(penalty: Callable[[Tensor], Tensor], maps: FeatureMaps) -> Tensor:
    # Each scale counts alike, however many logits it has.
    return torch.stack([penalty(scale[-1]).mean() for scale in maps]).mean()
