"""Linear layers by their initialisation, and the gated feed-forward layers made of them."""

from torch import Tensor, nn
from torch.nn import functional as F


def xavier_linear(
    in_features: int, out_features: int, bias: bool = True, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and a zero bias."""
    layer = kind(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)  # std (2 / (in + out))^0.5: neither outputs nor gradients grow
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


class GatedFeedForward(nn.Module):
    """`W_out (a * activate(b))` with `[a, b] = W_in x` (Shazeer 2020, equation 6); subclasses say what activates.

    Args:
        width: D.
        hidden: width of a and of b.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # Rows of a, then rows of b: one matrix product for both.
        self.input = xavier_linear(width, 2 * hidden)
        self.output = xavier_linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        value, gate = self.input(x).chunk(2, dim=-1)  # each [B, N, hidden]
        return self.output(value * self.activate(gate))  # [B, N, hidden] to [B, N, D]

    def activate(self, gate: Tensor) -> Tensor:
        """Elementwise."""
        raise NotImplementedError


class GegluFeedForward(GatedFeedForward):
    """GEGLU, `a * gelu(b)`: EzAudio's."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate)  # by erf, not the approximation by tanh


class SwigluFeedForward(GatedFeedForward):
    """SwiGLU, `a * silu(b)`: LLaMA's."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)
