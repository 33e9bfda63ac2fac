"""Devices by name: which of them there are, what they compute in, and how to wait for one."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from foley.core.logs import get_logger

MPS_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
"""`1` lets PyTorch run what MPS lacks on the CPU, with a warning for each operation; `foley/__init__.py` sets it."""
_log = get_logger(__name__)


def resolve_device(name: str | torch.device) -> torch.device:
    """A torch device by name; "auto" is the GPU where there is one: CUDA, or else Apple's MPS, or else the CPU.

    Raises ValueError for a GPU that is absent, and for a name that PyTorch does not know.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = next((kind for kind in ("cuda", "mps") if _is_there(torch.device(kind))), "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={name}: give auto, cpu, cuda, cuda:1 (the second GPU), or mps") from error
    if not _is_there(device):
        raise ValueError(f"device={name}: there is none here; device=auto takes {resolve_device('auto')}")
    if device.type == "mps" and os.environ.get(MPS_FALLBACK) != "1":
        _log.warning("operations that MPS lacks will fail: set the variable %s=1 to run them on the CPU", MPS_FALLBACK)
    return device


def resolve_devices(names: str | Sequence[str]) -> list[torch.device]:
    """One device or several, by name; "auto" is every GPU of CUDA, or else what it is to `resolve_device`.

    Raises ValueError as `resolve_device` does, and where none is named.

    >>> resolve_devices("cpu"), resolve_devices(["cpu"])
    ([device(type='cpu')], [device(type='cpu')])
    """
    if names == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not names:
        raise ValueError("device=[]: name one device at least")
    return [resolve_device(name) for name in ([names] if isinstance(names, str) else names)]


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """What this thread records, and allocates without a name, is on `device`: CUDA keeps a choice for each thread."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps" and not torch.backends.mps.is_available():
        return False
    return device.type not in ("cpu", "mps") or not device.index  # there is one of each


def machine_name(device: torch.device) -> str:
    """What computes there, as a report names it beside every time that it gives: the GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, MPS" if device.type == "mps" else described_processor()


def described_processor() -> str:
    """The processor, and how many of its threads compute."""
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'' if threads == 1 else 's'}"


@cache
def processor_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; what goes from the CPU to CUDA goes from pinned memory, which waits for no work there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def has_bf16(device: torch.device) -> bool:
    """Whether `device` is a GPU that computes in bfloat16 itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Products of float32 in TF32, or exact: those of matrices, and of convolutions, which PyTorch rounds on CUDA."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def synchronise(device: torch.device) -> None:
    """Wait for what `device` has been given to do, so that a clock can be read; a CPU has nothing waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
