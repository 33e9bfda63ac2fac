"""Weights that are no longer those of the start."""

import torch
from torch import nn


def stir(module: nn.Module, deviation: float = 0.1) -> None:
    """Add noise to every parameter: layers that start at zero would hide text and time, and what a cache reuses."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))
