"""Training checkpoints: what Lightning wrote of a run, and the components whose weights they hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foley.core.components import (
    CheckpointError,
    build_component,
    current_config,
    load_component,
    load_state,
    read_config,
    read_pickle,
)

FOLEY_KEY = "foley"
"""Entry of a training checkpoint that says how to build the components whose weights it holds."""


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, read as `read_pickle` does."""
    checkpoint: dict[str, Any] = read_pickle(path)
    if FOLEY_KEY not in checkpoint:
        raise CheckpointError(f"{path} was not written by foley: it has no `{FOLEY_KEY}` entry")
    checkpoint[FOLEY_KEY] = current_config(checkpoint[FOLEY_KEY])
    return checkpoint


def component_from_training(checkpoint: Mapping[str, Any], name: str, source: str) -> Any:
    """Component `name` of a training checkpoint that has been read already; in eval mode."""
    components = checkpoint[FOLEY_KEY]["components"]
    if name not in components:
        raise CheckpointError(f"{source} holds no component {name!r}, only {sorted(components)}")
    module = build_component(components[name], source)
    prefix = f"{name}."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    load_state(module, state, f"{source} [{name}]")
    return module.eval()


def load_trained(path: Path, name: str) -> Any:
    """Component `name` from a component directory or from a training checkpoint (averaged weights where kept)."""
    if path.is_dir():
        return load_component(path)
    return component_from_training(read_training_checkpoint(path), name, str(path))


def trained_config(path: Path, name: str) -> dict[str, Any]:
    """How to build what `load_trained` gives."""
    if path.is_dir():
        return read_config(path)
    config: dict[str, Any] = read_training_checkpoint(path)[FOLEY_KEY]["components"][name]
    return config
