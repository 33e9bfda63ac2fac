"""Content hashes of files and of modules: what ties a latent cache or a calibration to the model that made it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_CHUNK_BYTES = 1 << 20
_COMPILED = "_orig_mod"  # where `torch.compile(module)` keeps the module
_known_hashes: WeakKeyDictionary[nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of plain data, as hexadecimal, whatever the order of its mappings.

    >>> hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, independent of the order of the mapping."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_name(name: str) -> str:
    """A module's or tensor's dotted name without what `torch.compile` puts between.

    >>> plain_name("_orig_mod.blocks.0._orig_mod.weight")
    'blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `module` itself."""
    original: nn.Module = getattr(module, _COMPILED, module)
    return original


def is_compiled(module: nn.Module) -> bool:
    """As a whole or in parts, by `torch.compile(module)` or `module.compile()`."""
    return any(hasattr(part, _COMPILED) or part._compiled_call_impl is not None for part in module.modules())


def hash_module(module: nn.Module) -> str:
    """SHA-256 of everything in the module's state dict; remembered until a tensor of it is replaced or written to.

    A compiled module has the hash of the one that was compiled. Writes that PyTorch does not count, those through
    `tensor.data` or a NumPy view, go unnoticed.
    """
    module = uncompiled(module)
    tensors = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
    if any(tensor.is_inference() for tensor in tensors.values()):  # no writes to these are counted
        return hash_tensors(tensors)
    state = [_identity(name, tensor) for name, tensor in tensors.items()]
    known = _known_hashes.get(module)
    if known is None or known[0] != state:
        known = _known_hashes[module] = (state, hash_tensors(tensors))
    return known[1]


def adopt_hash(module: nn.Module, digest: str) -> None:
    """Let `module` count as the one whose hash is `digest`, until it changes: a rounded copy of it, for one."""
    module = uncompiled(module)
    state = [_identity(plain_name(name), tensor) for name, tensor in module.state_dict().items()]
    _known_hashes[module] = state, digest


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Equal as long as the tensor holds the same values.

    The weak reference keeps no memory, but keeps the storage's address from being given to another.
    """
    view = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return name, StorageWeakRef(tensor.untyped_storage()), tensor._version, *view
