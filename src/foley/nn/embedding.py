"""Embeddings of time, of the guidance scale, of a clip's length, of absolute position and of text."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from foley.nn.feedforward import normal_linear, zero_linear
from foley.nn.norm import without_autocast


def sinusoidal_embedding(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """`[B]` to `[B, dim]` in float32: cosines, then sines, at geometrically spaced frequencies."""
    # cos(t / max_period^(i / half)) and its sine: from one radian a step to nearly max_period steps a radian.
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)  # i / half, [dim / 2]
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def input_type(layers: nn.Module) -> torch.dtype:
    """What `layers` take: the type of their weights, or float32 where dynamic quantisation has packed these away.

    >>> input_type(nn.Linear(2, 2).bfloat16()), input_type(nn.ReLU())
    (torch.bfloat16, torch.float32)
    """
    return next((weight.dtype for weight in layers.parameters()), torch.float32)


class TimeEmbedding(nn.Module):
    """Diffusion time `[B]` to `[B, D]`: sinusoids through a two-layer MLP."""

    def __init__(self, width: int, num_sinusoids: int = 256) -> None:
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.mlp = nn.Sequential(normal_linear(num_sinusoids, width), nn.SiLU(), normal_linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """`[B]`, whole or fractional steps of the training schedule, to `[B, D]`."""
        # [B, 256]; in float32, since bfloat16 has no timestep 257.
        sinusoids = sinusoidal_embedding(timestep, self.num_sinusoids)
        return self.mlp(sinusoids.to(input_type(self.mlp)))


def guidance_sinusoids(scale: Tensor, dim: int) -> Tensor:
    """Guidance scale w `[B]` to `[B, dim]` in float32, as latent consistency models embed it (Luo et al. 2023).

    Sines, then cosines, of 1000 w at frequencies from 1 to exactly 1 / 10000.
    """
    # Unlike `sinusoidal_embedding`: sines come first, and `half - 1` reaches the last frequency; as published.
    half = dim // 2
    step = torch.full((), 10000.0, device=scale.device).log() / (half - 1)  # made there: a copy would wait
    # [B, half]; bfloat16 would round 1000 w, for w of 5 to 13, to multiples of 32 or 64.
    angles = 1000 * scale.float()[:, None] * torch.exp(-step * torch.arange(half, device=scale.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class GuidanceEmbedding(nn.Module):
    """Guidance scale w `[B]` to `[B, D]`: sinusoids through a projection that starts at zero.

    So a student that begins with its teacher's weights begins as the teacher, at every scale.
    """

    def __init__(self, width: int, num_sinusoids: int = 256) -> None:
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.projection = zero_linear(num_sinusoids, width)

    def forward(self, scale: Tensor) -> Tensor:
        """`[B]` to `[B, D]`."""
        sinusoids = guidance_sinusoids(scale, self.num_sinusoids)
        return self.projection(sinusoids.to(input_type(self.projection)))


class LengthEmbedding(nn.Module):
    """Length of a clip in latent frames `[B]` to `[B, D]`: sinusoids through a projection that starts at zero.

    The duration condition of Stable Audio (Evans et al. 2024, section 3.1), in frames, which a network counts itself.
    """

    def __init__(self, width: int, num_sinusoids: int = 256) -> None:
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.projection = zero_linear(num_sinusoids, width)  # a model that gains it begins as it was

    def forward(self, num_frames: Tensor) -> Tensor:
        """`[B]` to `[B, D]`."""
        # Hundreds of frames lie where thousands of timesteps do: the same frequencies tell both apart.
        sinusoids = sinusoidal_embedding(num_frames, self.num_sinusoids)
        return self.projection(sinusoids.to(input_type(self.projection)))


class LearnedPositions(nn.Module):
    """Adds a learned vector per position.

    Args:
        max_length: positions known; longer inputs raise ValueError.
        width: D.
    """

    def __init__(self, max_length: int, width: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table = nn.Parameter(torch.empty(max_length, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"{x.shape[1]} frames exceed the {self.max_length} learned positions: generate in windows that are no "
                "longer (window_seconds=), raise `learned_positions`, or use a model with rotary positions"
            )
        return x + self.table[: x.shape[1]].to(x.dtype)  # [B, N, D] + [N, D]


class ContextEmbedding(nn.Sequential):
    """Text `[B, S, Dc]` to `[B, S, D]`, by two layers.

    Under autocast, too, in the type of its weights: half precision rounds off what tells one word from another of a
    kind, and of its gradients leaves noise.
    """

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__(normal_linear(context_dim, width), nn.SiLU(), normal_linear(width, width))

    def forward(self, context: Tensor) -> Tensor:
        """See the class."""
        # Half precision keeps three digits: words of a kind, a large common part apart, differ in the next.
        with without_autocast(context):
            return cast(Tensor, super().forward(context))  # W_2 silu(W_1 c)
