"""What every converter needs: published files, the options in them, and a module around tensors that exist already."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from foley.core.components import CheckpointError, build_component, load_state, read_pickle
from foley.core.files import read_tensors


def flat_options(published: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in published.items():
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def check_options(
    options: Mapping[str, Any], needed: Collection[str], supported: Mapping[str, Collection[Any]], source: str
) -> None:
    """Raises ValueError where an option is missing, or is none of the `supported` values that we build."""
    if missing := [name for name in (*needed, *supported) if name not in options]:
        raise ValueError(
            f"{source}: the config does not say {', '.join(missing)}; it holds only "
            f"{', '.join(sorted(options)) or 'nothing'}. Give the config published with these weights"
        )
    for name, values in supported.items():
        if options[name] not in values:
            raise ValueError(
                f"{source}: `{name}: {options[name]}` is not supported, only {' or '.join(map(str, values))}; "
                "these weights are of another architecture"
            )


_WRAPPERS = ("model", "state_dict", "generator")
_SECTIONS = ("model", "config")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a published `.pt` file, flat or under a name out of `_WRAPPERS`, or of a `.safetensors` file.

    It is left on disk until used.

    Raises CheckpointError where the file is missing, cannot be read safely, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path, "published weights")
    content = _unwrap(read_pickle(path, mmap=True), _WRAPPERS)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights but {type(content).__name__}; give the published .pt file")
    if others := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{path} holds no state dict: {', '.join(others[:5])} are no tensors; tensors by name are expected, "
            f"either flat or under one of {', '.join(_WRAPPERS)}"
        )
    return dict(content)


def read_model_config(path: Path) -> dict[str, Any]:
    """The model section of a published YAML or JSON file, with what stands beside it, such as `sample_rate`.

    Raises ValueError where the file is missing or is no mapping.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={path} cannot be read as YAML or JSON: {error}") from error
    if not isinstance(document, Mapping):
        raise ValueError(f"config={path} holds no options but {document!r:.60}; give the published config")
    return {**document, **_unwrap(document, _SECTIONS)}


def _unwrap(content: Any, names: tuple[str, ...]) -> Any:
    """The first mapping found in `content` under one of `names`, or `content` itself."""
    if not isinstance(content, Mapping):
        return content
    return next((content[name] for name in names if isinstance(content.get(name), Mapping)), content)


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
