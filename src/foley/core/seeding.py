"""Stateless randomness: every random draw is a function of named integers and strings.

Deriving a generator from (seed, step, rank, purpose) instead of carrying generator state makes a resumed run
draw exactly what an uninterrupted one draws, whatever happened in between.
"""

import hashlib

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from `parts`; draw on the CPU, then move, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """The NumPy counterpart of `torch_generator`."""
    return np.random.default_rng(derive_seed(*parts))
