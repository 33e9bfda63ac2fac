"""Published text encoders: through transformers, which has its own cache."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from torch import nn

from foley.checkpoint import build_component
from foley.models.text import TextModelError
from foley.published.hub import Hub

_FILES = "config.json, tokenizer and safetensors"


def load_text(hub: Hub, config: Mapping[str, Any]) -> nn.Module:
    """The frozen encoder of a `FrozenT5Conditioner` config, from the folder, the cache, or the network, in this order.

    Raises CheckpointError at once where it is in none of them.
    """
    name = config["name_or_path"]
    if hub.directory is not None:
        config = {**config, "name_or_path": str(hub.file(name, "config.json").parent)}
        return _build(config)
    try:
        return _build(config)
    except InstantiationException as error:
        if not isinstance(error.__cause__, TextModelError):
            raise
    hub.require_network(name, "config.json", _FILES)
    return _build({**config, "download": True})


def _build(config: Mapping[str, Any]) -> nn.Module:
    text: nn.Module = build_component(config)
    return text.eval()
