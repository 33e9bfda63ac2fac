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
from foley.models.dit.controlnet import parted_config
from foley.models.text import StoredText, TextModelError
from foley.system.convert import load_converted
from foley.system.convert.files import build_around
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
_OTHERS = ("denoiser", "codec", "normaliser")


@dataclass(frozen=True)
class PublishedEzAudio:
    """The denoiser, its codec, and the text encoder it was trained with.

    Args:
        repository: on the hub, of both files.
        denoiser_file: the denoiser's weights.
        codec_file: the waveform VAE's weights.
        controlnet_file: the weights of a ControlNet around the denoiser, whose config is then that of both together.
        configs: a plain config for each component of a `System` and for "process".
        text_dir: a store of the text encoder's embeddings, which then is not loaded.
    """

    repository: str
    denoiser_file: str
    codec_file: str
    configs: Mapping[str, Config]
    text_dir: str | None = None
    controlnet_file: str | None = None

    def load(self, hub: Hub, cache_dir: Path) -> System:
        """Everything in eval mode, weights converted once into `cache_dir`.

        Raises CheckpointError at once where a file is neither here nor to be had.
        """
        for file in filter(None, (self.denoiser_file, self.controlnet_file, self.codec_file)):
            hub.file(self.repository, file)  # all are to be had before any is converted
        # The text encoder first: what is not to be had is known before anything is converted.
        modules = {name: self.load_component(name, hub, cache_dir) for name in ("text", *_OTHERS)}
        return System(modules, build_component(self.configs["process"]), self.configs)

    def load_component(self, name: str, hub: Hub, cache_dir: Path) -> nn.Module:
        """One of the system's components alone; raises as `load` does."""
        config = self.configs[name]
        match name:
            case "text":
                return StoredText(self.text_dir, config) if self.text_dir else load_text(hub, config)
            case "denoiser" if self.controlnet_file:
                return self._load_controlled(self.controlnet_file, hub, cache_dir)
            case "denoiser":
                return load_converted("ezaudio", hub.file(self.repository, self.denoiser_file), config, cache_dir)
            case "codec":
                return load_converted("waveform_vae", hub.file(self.repository, self.codec_file), config, cache_dir)
            case _:
                normaliser: nn.Module = build_component(config).eval()
                return normaliser

    def _load_controlled(self, controlnet_file: str, hub: Hub, cache_dir: Path) -> nn.Module:
        """Denoiser and ControlNet, each converted by itself, as one module."""
        together = dict(self.configs["denoiser"])
        model, control = parted_config(together)
        files = [hub.file(self.repository, name) for name in (self.denoiser_file, controlnet_file)]
        state = load_converted("ezaudio", files[0], model, cache_dir).state_dict()
        copy = load_converted("ezaudio_controlnet", files[1], control, cache_dir).state_dict()
        joined = {**state, **{f"control.{name}": value for name, value in copy.items()}}
        controlled: nn.Module = build_around(together, joined, f"{files[0]} and {files[1]}")
        return controlled
