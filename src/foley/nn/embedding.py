"""Embeddings of time and of absolute position."""

import math

import torch
from torch import Tensor, nn

from foley.nn.linear import normal_linear


def sinusoidal_embedding(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """`[B]` to `[B, dim]` in float32: cosines, then sines, at geometrically spaced frequencies."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Diffusion time `[B]` to `[B, D]`: sinusoids through a two-layer MLP."""

    def __init__(self, width: int, num_sinusoids: int = 256) -> None:
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.mlp = nn.Sequential(normal_linear(num_sinusoids, width), nn.SiLU(), normal_linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        sinusoids = sinusoidal_embedding(timestep, self.num_sinusoids)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class LearnedPositions(nn.Module):
    """Adds a learned vector per position.

    Args:
        max_length: positions known; longer inputs raise ValueError.
        width: D.
    """

    def __init__(self, max_length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_length, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if x.shape[1] > len(self.table):
            raise ValueError(
                f"{x.shape[1]} frames exceed the {len(self.table)} learned positions; "
                "raise `learned_positions`, shorten the audio, or use a model with rotary positions"
            )
        return x + self.table[: x.shape[1]]
