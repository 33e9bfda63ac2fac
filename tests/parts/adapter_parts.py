"""A small system that answers its text, and adapters of it with random values, as training would write them."""

from copy import deepcopy
from pathlib import Path

import torch
from small_system import CONFIGS
from stirring_parts import stir

from foley.core.hashing import hash_module
from foley.models.lora import Lora
from foley.system.adapters import save_adapters
from foley.system.system import System, build_system


def small_system() -> System:
    torch.manual_seed(0)
    built = build_system(CONFIGS)
    stir(built.modules["denoiser"])  # zero-initialised layers would hide the text and the time
    return built


def randomised(module: torch.nn.Module, seed: int, scale: float = 0.2) -> torch.nn.Module:
    """`module`, whose adapters have learnt something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return module


def write_adapters(folder: Path, modules, seed: int = 1, dora: bool = False, caption: str = "a zorble") -> str:
    """Adapters of copies of `modules`, by component."""
    adapted = {name: deepcopy(module) for name, module in modules.items()}
    for module in adapted.values():
        Lora(rank=2, dora=dora).inject(module)
        randomised(module, seed)
    base = {name: hash_module(module) for name, module in modules.items()}
    save_adapters(folder, adapted, base, [caption], source="a system", steps=3, clips=2)
    return str(folder)
