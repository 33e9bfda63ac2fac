"""The gated feed-forward layer."""

from torch import Tensor, nn
from torch.nn import functional as F

from foley.nn.linear import xavier_linear


class GegluFeedForward(nn.Module):
    """`W_out (a * gelu(b))` with `[a, b] = W_in x` (GEGLU, Shazeer 2020, equation 6).

    Args:
        width: D.
        hidden: width of a and of b.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = xavier_linear(width, 2 * hidden)
        self.output = xavier_linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        value, gate = self.input(x).chunk(2, dim=-1)
        return self.output(value * F.gelu(gate))
