"""Paths of the project, and the OmegaConf resolvers that the configs use."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

PROJECT_ROOT = Path(__file__).resolve().parents[3]


def relative_to_checkout(value: Any) -> Any:
    """A path inside the checkout as seen from its root, so that it holds where the checkout moved; others as given."""
    return value.removeprefix(f"{PROJECT_ROOT}/") if isinstance(value, str) else value


def cpu_precision() -> str:
    """Lightning's name for the fastest precision of this processor: bfloat16 only where it computes in it."""
    # PyTorch offers no public query for this instruction set.
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def run_id(folder: str) -> str:
    """An id that follows from the output folder alone: by it a restarted run's loggers find its earlier lives."""
    return hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12]


def fused_optimizer(accelerator: str, precision: str | int) -> bool | None:
    """True for one fused kernel: on GPUs, but not with loss scaling, whose gradients are clipped outside.

    None elsewhere, which leaves AdamW its own choice; False would also rule out its next best implementation.
    """
    on_gpu = torch.cuda.is_available() and accelerator in ("gpu", "cuda", "auto")
    return True if on_gpu and not str(precision).startswith("16") else None


def register_resolvers() -> None:
    """`${project_root:}` is the root of the checkout, wherever the command runs; the others are the functions above."""
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
    OmegaConf.register_new_resolver("fused_optimizer", fused_optimizer, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)


register_resolvers()
