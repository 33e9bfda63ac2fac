"""Where things lie, in a checkout and in an installed package, and the OmegaConf resolvers that the configs use.

PyTorch is imported where it is asked, so that the command's help and completion answer at once.
"""

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = (_PACKAGE / "shipped").is_dir()  # hatch_build.py puts it into the wheel; a checkout has none

SHIPPED_ROOT = _PACKAGE / "shipped" if _INSTALLED else _PACKAGE.parents[1]
"""Holds what travels with the package: configs/, scripts/, data/ and the root scripts, laid out as in the checkout."""

PROJECT_ROOT = Path.cwd() if _INSTALLED else SHIPPED_ROOT
"""Where outputs go and relative paths start: the checkout, or with an installed package the current folder."""

CONFIG_DIR = SHIPPED_ROOT / "configs"


def shipped(name: str) -> Path:
    """What ships under this name in data/: `demo`, `extractor`, `prompts/demo.jsonl`, ...; it may not exist.

    >>> (shipped("demo") / "system.json").is_file()
    True
    """
    return SHIPPED_ROOT / "data" / name


def relative_to_checkout(value: Any) -> Any:
    """A path inside the checkout as seen from its root, so that it holds where the checkout moved; others as given.

    What ships with an installed package is named as it is in a checkout; `locate` finds it again.
    """
    if not isinstance(value, str):
        return value
    return value.removeprefix(f"{SHIPPED_ROOT}/").removeprefix(f"{PROJECT_ROOT}/")


def locate(stored: str) -> Path:
    """The file or folder of a path that `relative_to_checkout` gave: in the project, or else among what ships."""
    path = PROJECT_ROOT / stored
    return path if path.exists() or not (SHIPPED_ROOT / stored).exists() else SHIPPED_ROOT / stored


def cpu_precision() -> str:
    """Lightning's name for the fastest precision of this processor: bfloat16 only where it computes in it."""
    import torch

    # PyTorch offers no public query for this instruction set.
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def run_id(folder: str) -> str:
    """An id that follows from the output folder alone: by it a restarted run's loggers find its earlier lives."""
    return hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12]


def fused_optimizer(accelerator: str, precision: str | int) -> bool | None:
    """True for one fused kernel: on GPUs, but not with loss scaling, whose gradients are clipped outside.

    None elsewhere, which leaves AdamW its own choice; False would also rule out its next best implementation.
    """
    import torch

    on_gpu = torch.cuda.is_available() and accelerator in ("gpu", "cuda", "auto")
    return True if on_gpu and not str(precision).startswith("16") else None


def register_resolvers() -> None:
    """`${project_root:}` is `PROJECT_ROOT`, wherever the command runs; the others are the functions above."""
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("shipped", lambda name: str(shipped(name)), replace=True)
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
    OmegaConf.register_new_resolver("fused_optimizer", fused_optimizer, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)


register_resolvers()
