"""Published text encoders: through transformers, which has its own cache."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HTTPError
from hydra.errors import InstantiationException
from safetensors import SafetensorError
from torch import nn

from foley.checkpoint import CheckpointError, build_component
from foley.models.text import TextModelError
from foley.published.hub import Hub

_FILES = "config.json, tokenizer and safetensors"
_FAILURES = (TextModelError, SafetensorError, HTTPError, OSError)


def load_text(hub: Hub, config: Mapping[str, Any]) -> nn.Module:
    """The frozen encoder of a `FrozenT5Conditioner` config, from the folder, the cache, or the network, in this order.

    Raises CheckpointError, at once where it is in none of them, and where its files are not whole.
    """
    name = config["name_or_path"]
    if hub.directory is not None:
        return _build({**config, "name_or_path": str(hub.file(name, "config.json").parent)})
    try:
        return _build(config)
    except CheckpointError:
        hub.require_network(name, "config.json", _FILES)
    return _build({**config, "download": True})


def _build(config: Mapping[str, Any]) -> nn.Module:
    try:
        text: nn.Module = build_component(config)
    except InstantiationException as error:
        if not isinstance(error.__cause__, _FAILURES):
            raise
        raise CheckpointError(f"text encoder {config['name_or_path']}: {error.__cause__}") from error
    return text.eval()
