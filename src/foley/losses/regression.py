"""Regression losses that count only the frames a mask keeps."""

import torch
from torch import Tensor
from torch.nn.functional import huber_loss


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` `[B, C, L]` over channels and the frames where `mask` `[B, L]` is true; 0 where none is."""
    if mask is None:
        return values.mean()
    weights = mask[:, None].to(values)
    # where, not a product: a masked frame must not leak its NaN.
    kept = torch.where(mask[:, None], values, torch.zeros_like(values))
    return kept.sum() / (weights.sum() * values.shape[1]).clamp(min=1)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of `[B, C, L]` tensors over the frames where `mask` `[B, L]` is true."""
    return masked_mean((prediction - target).square(), mask)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3, mask: Tensor | None = None) -> Tensor:
    """Mean of `sqrt(d^2 + c^2) - c` over valid frames (Song & Dhariwal 2023, eq. 7; AudioLCM uses c = 0.001)."""
    return masked_mean(((prediction - target).square() + c**2).sqrt() - c, mask)


def huber(prediction: Tensor, target: Tensor, eta: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Mean over valid frames of `d^2 / 2` up to `|d| = eta` and `eta (|d| - eta / 2)` beyond it (AudioLCM, eq. 15)."""
    return masked_mean(huber_loss(prediction, target, reduction="none", delta=eta), mask)
