"""EzAudio as OpenSound publishes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foley.checkpoint import build_component
from foley.convert import load_converted
from foley.published.hub import Hub
from foley.published.text import load_text
from foley.system import System

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PublishedEzAudio:
    """The denoiser, its codec, and the text encoder it was trained with.

    Args:
        repository: on the hub, of both files.
        denoiser_file: the denoiser's weights.
        codec_file: the waveform VAE's weights.
        configs: a plain config for each component of a `System` and for "process".
    """

    repository: str
    denoiser_file: str
    codec_file: str
    configs: Mapping[str, Config]

    def load(self, hub: Hub, cache_dir: Path) -> System:
        """Everything in eval mode, weights converted once into `cache_dir`.

        Raises CheckpointError at once where a file is neither here nor to be had.
        """
        denoiser_file = hub.file(self.repository, self.denoiser_file)
        codec_file = hub.file(self.repository, self.codec_file)
        modules = {
            "text": load_text(hub, self.configs["text"]),
            "denoiser": load_converted("ezaudio", denoiser_file, self.configs["denoiser"], cache_dir),
            "codec": load_converted("waveform_vae", codec_file, self.configs["codec"], cache_dir),
            "normaliser": build_component(self.configs["normaliser"]).eval(),
        }
        return System(modules, build_component(self.configs["process"]), self.configs)
