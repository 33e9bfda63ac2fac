"""Paths of the project, what the configs say of published systems, and the OmegaConf resolvers that configs use."""

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

PROJECT_ROOT = Path(__file__).resolve().parents[3]
CONFIG_DIR = PROJECT_ROOT / "configs"


def shipped(name: str) -> Path:
    """What ships with this package: "demo" is a system, "extractor" what judges it, "prompts", "tokenizer"."""
    return PROJECT_ROOT / "data" / name


def default_cache_dir() -> str:
    """Where converted weights and downloads are kept: the variable FOLEY_CACHE, or else `~/.cache/foley`."""
    return os.environ.get("FOLEY_CACHE", "~/.cache/foley")


def published_name(system: str | Path | None) -> str | None:
    """`system` where it names a published one, `configs/published/<name>.yaml`; None for any path.

    >>> published_name("ezaudio_xl"), published_name("./ezaudio_xl"), published_name(Path("ezaudio_xl"))
    ('ezaudio_xl', None, None)
    """
    if not isinstance(system, str) or not system.isidentifier():
        return None
    return system if (CONFIG_DIR / "published" / f"{system}.yaml").is_file() else None


def published_config(name: str, overrides: Mapping[str, Any] | None = None) -> DictConfig:
    """What `configs/published/<name>.yaml` says: `published` builds the loader, `sampling` has the defaults.

    Args:
        overrides: merged into it, such as `{"published": {"dtype": "float16"}}`.
    """
    merged = OmegaConf.merge(_compose_published(name), overrides or {})
    assert isinstance(merged, DictConfig)
    return merged


@lru_cache
def _compose_published(name: str) -> DictConfig:
    # Hydra composes one application at a time: the one that this may be inside of is set aside.
    around = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose(f"published/{name}")
    finally:
        GlobalHydra.instance().hydra = around  # the context manager leaves another instance


def published_default(key: str, otherwise: Any, _root_: DictConfig) -> Any:
    """What the published system that the option `system` names says of sampling; else `otherwise`."""
    name = published_name(OmegaConf.select(_root_, "system"))
    if name is None:
        return otherwise
    return published_config(name, _root_.get("system_overrides")).sampling.get(key, otherwise)


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
    OmegaConf.register_new_resolver("shipped", lambda name: str(shipped(name)), replace=True)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    OmegaConf.register_new_resolver("published", published_default, replace=True)


register_resolvers()
