"""Makes a denoiser cheaper to run without changing what it is: half precision, compiled blocks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from foley.core.devices import float32_products, has_bf16
from foley.core.hashing import adopt_hash, hash_module

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> str:
    """`precision` itself; "auto" is bf16 on a CUDA device that computes in it, and float32 elsewhere.

    Raises ValueError for an unknown precision.

    >>> choose_precision("auto", torch.device("cpu"))
    'float32'
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "float32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


@contextmanager
def computing_in(precision: str, device: torch.device, autocast: bool = False) -> Iterator[None]:
    """What is computed inside the context on `device`, in a precision of `choose_precision`.

    float32 is exact: CUDA multiplies without TF32. Beside a half precision, what stays in float32 may use it. With
    `autocast`, weights held in float32 are multiplied in half precision too; without, they are what `set_precision`
    made them.
    """
    exact = precision == "float32"
    products = float32_products(tf32=not exact) if device.type == "cuda" else nullcontext()
    with products, torch.autocast(device.type, PRECISIONS[precision], enabled=autocast and not exact):
        yield


def set_precision(denoiser: nn.Module, precision: str) -> None:
    """Round the weights to `precision`; the denoiser still takes and returns latents in theirs.

    It keeps its hash, so that calibrations made in float32 hold. Raises ValueError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    digest = hash_module(denoiser)  # of the weights before they are rounded
    denoiser.to(PRECISIONS[precision])
    adopt_hash(denoiser, digest)


def compile_blocks(denoiser: Any, **options: Any) -> None:
    """Compile each block of the denoiser at its first use; all blocks of one shape share one compilation.

    So is each cacheable layer, for the accelerators that take a block apart (`replaced_forwards` of `LayerCache`).

    Args:
        denoiser: has `blocks()`; raises ValueError for one that has not.
        options: of `torch.compile`.
    """
    if not callable(getattr(denoiser, "blocks", None)):
        raise ValueError(f"compile=true: {type(denoiser).__name__} does not say which blocks to compile (`blocks()`)")
    for block in denoiser.blocks():
        block.compile(**options)  # in place: neither the module's name nor its state dict changes
        for layer in block.modules():
            if hasattr(layer, "cacheable_kind"):
                # Beside the plain one, for `replaced_forwards`.
                layer.compiled_forward = torch.compile(layer.forward, **options)
