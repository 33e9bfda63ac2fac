"""Paths of the project, and the OmegaConf resolvers that the configs use."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def cpu_precision() -> str:
    """Lightning's name for the fastest precision of this processor: bfloat16 only where it computes in it."""
    # PyTorch offers no public query for this instruction set.
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def register_resolvers() -> None:
    """`${project_root:}` is the checkout's root, wherever the command is run from; `${cpu_precision:}` as above."""
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


register_resolvers()
