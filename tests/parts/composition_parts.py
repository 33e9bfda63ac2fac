"""A small denoiser under a cache and sparse attention together; as a program, it prints what one generation gives."""

import torch
from stirring_parts import stir

from foley.accel.attention.local_global import LocalGlobal
from foley.accel.caching.fora import Fora
from foley.accel.combined import Combined
from foley.core.hashing import hash_tensors
from foley.core.seeding import torch_generator
from foley.diffusion.context import Accelerator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLNSola

CHANNELS, FRAMES, CONTEXT_DIM = 4, 20, 6


def build_denoiser() -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(CHANNELS, 16, 2, 2, CONTEXT_DIM, AdaLNSola(rank=2, alpha=2))
    stir(model)  # layers that start at zero would have nothing to cache
    return model.eval()


def both(reuse: str = "taylor") -> Combined:
    return Combined([Fora(2, reuse), LocalGlobal(window_frames=3, ratio=0.2)])


def generate(denoiser: DiffusionTransformer, accelerator: Accelerator | None = None) -> torch.Tensor:
    """Two clips by a solver that adds noise, with guidance."""
    rows = [torch.randn(2, 3, CONTEXT_DIM, generator=torch_generator(name)) for name in ("text", "empty")]
    positive, negative = (Conditioning(row, torch.ones(2, 3, dtype=torch.bool)) for row in rows)
    guidance, solver = ClassifierFreeGuidance(3.0), Solver("dpmpp_2m_sde", 6)
    process = DiffusionProcess("v")
    return generate_latents(denoiser, process, positive, negative, [0, 1], FRAMES, guidance, solver, accelerator)


def digest(latent: torch.Tensor) -> str:
    return hash_tensors({"latent": latent})


if __name__ == "__main__":
    print(digest(generate(build_denoiser(), both())))  # noqa: T201
