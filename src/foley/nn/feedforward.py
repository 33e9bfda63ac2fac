"""The gated feed-forward layers."""

from torch import Tensor, nn
from torch.nn import functional as F

from foley.nn.linear import xavier_linear


class GatedFeedForward(nn.Module):
    """`W_out (a * activate(b))` with `[a, b] = W_in x` (Shazeer 2020, equation 6); subclasses say what activates.

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
        return self.output(value * self.activate(gate))

    def activate(self, gate: Tensor) -> Tensor:
        raise NotImplementedError


class GegluFeedForward(GatedFeedForward):
    """GEGLU: EzAudio's."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate)


class SwigluFeedForward(GatedFeedForward):
    """SwiGLU: LLaMA's."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)
