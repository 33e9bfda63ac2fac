"""A module around tensors that exist already."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foley.checkpoint import build_component, load_state


def build_around(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> Any:
    """The component of `config` in eval mode, its parameters being the tensors of `state` as float32.

    Nothing is initialised or copied, so a large model needs its memory once, or, where `state` is mapped from a file,
    only as it is used. Buffers outside the state dict stay without values: for components that have none.

    Raises CheckpointError where keys or shapes are left over on either side.
    """
    with torch.device("meta"):
        module = build_component(config, source)
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    load_state(module, floats, source, assign=True)
    return module.eval()
