"""Published files of the Descript Audio Codec as `DACCodec`: what they are is said by their own metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from foley.core.components import CheckpointError, written_out
from foley.models.codec.dac import LATENTS, DACCodec, architecture, is_published, space_index
from foley.system.convert.files import build_around

_SOURCE = "published DAC weights"
_TARGET = "foley.models.codec.dac.DACCodec"
_CHOICES = ("latent", "quantised")  # ours, of which a file knows nothing
_SUFFIXES = (".pth", ".pt")


def file_config(path: Path) -> dict[str, Any]:
    """Our config of the model in a published file; raises CheckpointError."""
    return {"_target_": _TARGET, **architecture(path)}


def dac_config(options: Mapping[str, Any], source: str = _SOURCE) -> dict[str, Any]:
    """A file's own config (`options["file"]`) with the choices of `codec=` where that is given.

    Raises ValueError where the two are of different models: of another rate, hop or size.
    """
    own, chosen = dict(options["file"]), {name: value for name, value in options.items() if name != "file"}
    choices = {name: chosen[name] for name in _CHOICES if name in chosen}
    stated = written_out(chosen) if "_target_" in chosen else {}
    found = {name: (value, stated[name]) for name, value in own.items() if stated.get(name) not in (None, value)}
    if found:
        lines = [f"{name} is {value} in the file and {other} in codec=" for name, (value, other) in found.items()]
        raise ValueError(f"{source} holds another model than codec= says: {'; '.join(lines)}")
    return {**own, **choices}


def dac_codec(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], source: str = _SOURCE) -> DACCodec:
    """The published codec in eval mode, around the tensors given; raises CheckpointError where they do not fit."""
    state = {f"published.{name}": value for name, value in state_dict.items()}
    space = {"space": space_index(config.get("latent", LATENTS[0]))}
    codec: DACCodec = build_around(config, state | space, source)
    return codec


def is_dac_file(path: Path) -> bool:
    """Whether `path` is a published file, by its name's ending and its content."""
    try:
        return path.suffix in _SUFFIXES and path.is_file() and is_published(path)
    except CheckpointError:  # whoever reads it as something else says what it is
        return False
