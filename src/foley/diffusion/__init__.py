"""Schedules, targets, guidance and samplers: everything of diffusion that needs no network.

A denoiser is a callable here, `(noisy [B, C, L], timestep [B]) -> prediction [B, C, L]`.
"""

from foley.diffusion.consistency import Consistency, ConsistencySolver
from foley.diffusion.context import Accelerator, RunContext, SamplerCallback, StepContext
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, EmbeddedGuidance, KnownLatent
from foley.diffusion.guiders import IntervalGuidance, ProjectedGuidance
from foley.diffusion.process import PREDICTIONS, DiffusionProcess
from foley.diffusion.sampler import Start, embed, generate_latents, sample
from foley.diffusion.solver import SOLVERS, Solver, default_solver
from foley.diffusion.windows import Windows

__all__ = [
    "PREDICTIONS",
    "SOLVERS",
    "Accelerator",
    "ClassifierFreeGuidance",
    "Conditioning",
    "Consistency",
    "ConsistencySolver",
    "DiffusionProcess",
    "EmbeddedGuidance",
    "IntervalGuidance",
    "KnownLatent",
    "ProjectedGuidance",
    "RunContext",
    "SamplerCallback",
    "Solver",
    "Start",
    "StepContext",
    "Windows",
    "default_solver",
    "embed",
    "generate_latents",
    "sample",
]
