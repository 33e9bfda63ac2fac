"""Published checkpoint files as component directories: written on request, or once into a cache."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from foley.core.components import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, read_config, save_component
from foley.core.files import write_text
from foley.core.hashing import hash_file
from foley.core.logs import get_logger
from foley.system.convert.bigvgan import bigvgan, vocoder_config
from foley.system.convert.dac import dac_codec, dac_config, file_config
from foley.system.convert.ezaudio import (
    controlnet_config,
    denoiser_config,
    ezaudio_controlnet,
    ezaudio_denoiser,
)
from foley.system.convert.files import build_around, read_weights
from foley.system.convert.oobleck import oobleck_codec, oobleck_config
from foley.system.convert.waveform_vae import codec_config, waveform_vae

logger = get_logger(__name__)

_CACHE_FORMAT = "1"  # raise it when a conversion changes, so that earlier ones are not used


@dataclass(frozen=True)
class Source:
    """A kind of published checkpoint: what it holds, its terms of use, and how it becomes ours.

    `component_config` takes the published config or one of ours; `build` takes the state dict, such a config, and
    the name of the file for its errors. `file_config` reads what the file itself says of its model, where it does.
    """

    title: str
    terms_url: str
    component_config: Callable[[Mapping[str, Any], str], dict[str, Any]]
    build: Callable[[Mapping[str, Any], Mapping[str, Any], str], nn.Module]
    file_config: Callable[[Path], Mapping[str, Any]] | None = None


_EZAUDIO_URL = "https://huggingface.co/OpenSound/EzAudio"
SOURCES: Mapping[str, Source] = {
    "ezaudio": Source("EzAudio denoiser", _EZAUDIO_URL, denoiser_config, ezaudio_denoiser),
    "ezaudio_controlnet": Source("EzAudio ControlNet", _EZAUDIO_URL, controlnet_config, ezaudio_controlnet),
    "waveform_vae": Source("EzAudio waveform VAE", _EZAUDIO_URL, codec_config, waveform_vae),
    "bigvgan": Source("BigVGAN vocoder", "https://github.com/NVIDIA/BigVGAN", vocoder_config, bigvgan),
    "dac": Source(
        "Descript Audio Codec",
        "https://github.com/descriptinc/descript-audio-codec",
        dac_config,
        dac_codec,
        file_config,
    ),
    "oobleck": Source(
        "Codec of Stable Audio Open",
        "https://huggingface.co/stabilityai/stable-audio-open-1.0",
        oobleck_config,
        oobleck_codec,
    ),
}

_CARD = """# {title}

Converted for foley from a published checkpoint. The values are unchanged; names follow our modules.

| | |
|---|---|
| source file | `{file}` |
| SHA-256 of the source | `{sha256}` |
| parameters | {parameters:,} |
| licence | that of the source, see <{terms_url}> |

```python
from pathlib import Path
from foley.core.components import load_component

module = load_component(Path("{directory}"))  # in eval mode, float32
```
"""


def convert_checkpoint(source: str, ckpt: Path, config: Mapping[str, Any], directory: Path) -> nn.Module:
    """Write the published file `ckpt` into `directory`, with a model card; returns the module in eval mode.

    Args:
        source: a name out of `SOURCES`.
        config: the published model section, or a plain config of ours with `_target_`; may be empty where the file
            says what it holds.

    Raises ValueError or CheckpointError where file, config and source do not belong together.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    kind = SOURCES[source]
    said = {} if kind.file_config is None else {"file": kind.file_config(ckpt)}
    own_config = kind.component_config({**config, **said}, f"{ckpt} as source={source}")
    module = kind.build(read_weights(ckpt), own_config, str(ckpt))
    card = _CARD.format(
        title=kind.title,
        file=ckpt.name,
        sha256=hash_file(ckpt),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        terms_url=kind.terms_url,
        directory=directory,
    )
    write_text(directory / "README.md", card)
    save_component(module, own_config, directory)
    return module


def load_converted(source: str, ckpt: Path, config: Mapping[str, Any], cache_dir: Path) -> nn.Module:
    """The component in `ckpt`, by way of `converted_folder`.

    Weights are mapped from the cache, not copied. Takes and raises what `convert_checkpoint` does.
    """
    directory = converted_folder(source, ckpt, config, cache_dir)
    try:
        state = load_file(directory / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory} cannot be read ({error}); delete it, and it is written anew") from error
    module: nn.Module = build_around(read_config(directory), state, str(directory))
    return module


def converted_folder(source: str, ckpt: Path, config: Mapping[str, Any], cache_dir: Path) -> Path:
    """Where `ckpt` lies converted in `cache_dir`: it is, unless this very content is there with this config."""
    identity = json.dumps([_CACHE_FORMAT, source, hash_file(ckpt), config], sort_keys=True)
    directory = cache_dir / f"{source}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not (directory / CONFIG_FILE).is_file():  # written last
        logger.info("converting %s into %s, once", ckpt, directory)
        convert_checkpoint(source, ckpt, config, directory)
    return directory
