"""Regression losses between latents that count only the frames a mask keeps.

With `d = prediction - target`, element by element, and a mean over channels and the frames that count:

    masked_mse    d^2
    pseudo_huber  sqrt(d^2 + c^2) - c                                   Song & Dhariwal 2023, equation 7
    huber         d^2 / 2, and eta (|d| - eta / 2) beyond |d| = eta     AudioLCM (Liu et al. 2024), equation 15
"""

import torch
from torch import Tensor
from torch.nn.functional import huber_loss


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` `[B, C, L]` over channels and the frames where `mask` `[B, L]` is true; 0 where none is.

    >>> masked_mean(torch.tensor([[[1.0, 3.0, 8.0]]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    if mask is None:
        return values.mean()
    weights = mask[:, None].to(values)  # [B, 1, L]
    # where, not a product: a masked frame must not leak its NaN.
    kept = torch.where(mask[:, None], values, torch.zeros_like(values))
    # Over C times the frames that count; 0 / 1 where none does.
    return kept.sum() / (weights.sum() * values.shape[1]).clamp(min=1)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of `[B, C, L]` tensors over the frames where `mask` `[B, L]` is true."""
    return masked_mean((prediction - target).square(), mask)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3, mask: Tensor | None = None) -> Tensor:
    """Quadratic below `c` and linear beyond it, and smooth; of `[B, C, L]`, masked by `[B, L]`. AudioLCM: c = 0.001."""
    return masked_mean(((prediction - target).square() + c**2).sqrt() - c, mask)


def huber(prediction: Tensor, target: Tensor, eta: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Quadratic up to `eta` and linear beyond it; of `[B, C, L]`, masked by `[B, L]`."""
    return masked_mean(huber_loss(prediction, target, reduction="none", delta=eta), mask)
