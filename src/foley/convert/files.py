"""Published files: weights and configs, out of whatever their authors wrapped them in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from foley.checkpoint import CheckpointError, read_pickle

_WRAPPERS = ("model", "state_dict", "generator")
_SECTIONS = ("model", "config")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a published `.pt` file, flat or under a name out of `_WRAPPERS`; left on disk until used.

    Raises CheckpointError where the file is missing, cannot be read safely, or holds no state dict.
    """
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
