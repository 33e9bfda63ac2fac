"""Linear layers by how they start."""

from torch import nn


def xavier_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and a zero bias."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def normal_linear(in_features: int, out_features: int, std: float = 0.02) -> nn.Linear:
    """A linear layer with normal weights and a zero bias, as DiT starts its conditioning networks."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer that starts as zero, so that what it feeds starts without it."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.zeros_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
