"""EzAudio's published systems, from the hub to modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from hydra.errors import InstantiationException
from safetensors import SafetensorError
from torch import nn

from foley.core.components import CheckpointError, build_component
from foley.core.hub import Hub
from foley.models.text import StoredText, TextModelError
from foley.system.convert import load_converted
from foley.system.system import System

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


Config = Mapping[str, Any]


@dataclass(frozen=True)
class PublishedEzAudio:
    """The denoiser, its codec, and the text encoder it was trained with.

    Args:
        repository: on the hub, of both files.
        denoiser_file: the denoiser's weights.
        codec_file: the waveform VAE's weights.
        configs: a plain config for each component of a `System` and for "process".
        text_dir: a store of the text encoder's embeddings, which then is not loaded.
    """

    repository: str
    denoiser_file: str
    codec_file: str
    configs: Mapping[str, Config]
    text_dir: str | None = None

    def load(self, hub: Hub, cache_dir: Path) -> System:
        """Everything in eval mode, weights converted once into `cache_dir`.

        Raises CheckpointError at once where a file is neither here nor to be had.
        """
        denoiser_file = hub.file(self.repository, self.denoiser_file)
        hub.file(self.repository, self.codec_file)  # both are to be had before either is converted
        text = self.configs["text"]
        modules = {
            "text": StoredText(self.text_dir, text) if self.text_dir else load_text(hub, text),
            "denoiser": load_converted("ezaudio", denoiser_file, self.configs["denoiser"], cache_dir),
            "codec": self.load_codec(hub, cache_dir),
            "normaliser": build_component(self.configs["normaliser"]).eval(),
        }
        return System(modules, build_component(self.configs["process"]), self.configs)

    def load_codec(self, hub: Hub, cache_dir: Path) -> nn.Module:
        """The codec alone; raises as `load` does."""
        file = hub.file(self.repository, self.codec_file)
        return load_converted("waveform_vae", file, self.configs["codec"], cache_dir)
