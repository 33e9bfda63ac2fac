"""A transformer-shaped toy that follows the cacheable-layer protocol, and a way to sample from it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import Start, sample
from foley.diffusion.solver import Solver

CHANNELS, WIDTH, TOKENS = 4, 8, 3


class ToyLayer(nn.Module):
    """Norm, modulation and a linear map; counts how often it really runs."""

    def __init__(self, kind: str, broken_at: int | None = None) -> None:
        super().__init__()
        self.cacheable_kind = kind
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.runs = 0
        self.broken_at = broken_at

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        self.runs += 1
        if self.runs == self.broken_at:
            raise ArithmeticError("the layer breaks")
        output: Tensor = self.linear(self.norm(hidden) + shift)
        return output


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention = ToyLayer("self_attention")
        self.cross_attention = ToyLayer("cross_attention")
        self.feed_forward = ToyLayer("feed_forward")

    def forward(self, hidden: Tensor, shift: Tensor, text: Tensor) -> Tensor:
        hidden = hidden + self.self_attention(hidden, shift)
        hidden = hidden + self.cross_attention(hidden, shift=text)
        return hidden + self.feed_forward(hidden, shift)


class ToyDenoiser(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(depth))

    def forward(self, noisy: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(noisy.transpose(1, 2))
        shift = torch.sin(timestep / 300)[:, None, None].expand(-1, 1, WIDTH)
        text = context.mean(dim=1, keepdim=True) * shift
        for block in self.blocks:
            hidden = block(hidden, shift, text)
        prediction: Tensor = self.head(hidden).transpose(1, 2)
        return prediction

    def runs(self) -> dict[str, int]:
        return {name: module.runs for name, module in self.named_modules() if isinstance(module, ToyLayer)}


Generate = Callable[..., Tensor]


@pytest.fixture
def denoiser() -> ToyDenoiser:
    torch.manual_seed(0)
    return ToyDenoiser().eval()


@pytest.fixture
def generate() -> Generate:
    """`generate(denoiser, callbacks=(), solver="ddim", num_steps=6, guidance_scale=3, seeds=(0, 1), ...) -> latent`."""

    def run(
        denoiser: nn.Module,
        callbacks: Sequence[Any] = (),
        solver: str = "ddim",
        num_steps: int = 6,
        guidance_scale: float = 3.0,
        seeds: Sequence[int] = (0, 1),
        start: Start | None = None,
        prediction: str = "v",
    ) -> Tensor:
        choice, guidance = Solver(solver, num_steps), ClassifierFreeGuidance(guidance_scale)
        scheduler = choice.build(DiffusionProcess(prediction))
        rows = [torch.randn(5, WIDTH, generator=torch_generator("text", seed)) for seed in seeds]
        positive = Conditioning(torch.stack(rows), torch.ones(len(seeds), 5, dtype=torch.bool))
        negative = Conditioning(torch.zeros(1, 1, WIDTH), torch.ones(1, 1, dtype=torch.bool))
        noise = torch.stack([torch.randn(CHANNELS, TOKENS, generator=torch_generator("noise", s)) for s in seeds])
        context = choice.run_context(scheduler, guidance, len(seeds))
        denoise = guidance.wrap(denoiser, positive, negative)
        generators = [torch_generator("solver noise", seed) for seed in seeds]
        return sample(denoise, noise, scheduler, context, callbacks, generators, start=start)

    return run
