"""A text-to-audio system: published, an exported directory, or a training checkpoint and the codec it names."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from foley.core.components import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    build_component,
    current_config,
    load_component,
    read_config,
    save_component,
)
from foley.core.config import default_cache_dir, locate, published_config, published_name
from foley.core.files import write_json, write_text
from foley.core.hashing import hash_file, hash_module
from foley.core.hub import Hub
from foley.core.numbers import POSITIVE
from foley.diffusion.consistency import Consistency
from foley.diffusion.process import DiffusionProcess
from foley.models.lora import AdaptedDenoiser
from foley.system.checkpoint import (
    FOLEY_KEY,
    component_from_training,
    load_trained,
    read_training_checkpoint,
    trained_config,
)

SYSTEM_FILE = "system.json"
SYSTEM_FORMAT = "foley-system/1"
CAPTIONS_FILE = "captions.txt"
STUDENT_FOLDER = "student"
COMPONENTS = ("denoiser", "text", "codec", "normaliser")
_METHODS = ("process", "consistency")


@dataclass(frozen=True)
class System:
    """The modules of a system by component name, the process they were trained on, and how to build each of them.

    `configs` has an entry for every component and for "process". A distilled student also has `consistency`, which says
    how it samples, and its entry. `captions` stand for those that it was trained on (`foley.generation.novelty`), where
    known. `trained_seconds` is the length of its training's items, where known.
    """

    modules: Mapping[str, nn.Module]
    process: DiffusionProcess
    configs: Mapping[str, Mapping[str, Any]]
    consistency: Consistency | None = None
    captions: Sequence[str] = ()
    trained_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.trained_seconds is not None:
            POSITIVE.check("trained_seconds", self.trained_seconds)


def build_system(configs: Mapping[str, Mapping[str, Any]]) -> System:
    """A system with fresh, untrained weights, out of a plain config for each component and for "process"."""
    return _assemble({name: build_component(configs[name]).eval() for name in COMPONENTS}, configs, "config")


def untrained_system(composed: DictConfig) -> System:
    """A system with fresh weights out of the Hydra groups model, text, codec and process."""
    nodes = {"denoiser": composed.model, "text": composed.text, "codec": composed.codec, "process": composed.process}
    configs: dict[str, Any] = {name: OmegaConf.to_container(node, resolve=True) for name, node in nodes.items()}
    configs["normaliser"] = {
        "_target_": "foley.models.codec.normaliser.LatentNormaliser",
        "channels": composed.codec.latent_channels,
    }
    return build_system(configs)


def load_system(source: str | Path, with_codec: bool = True) -> System:
    """Read a system by what `system=` takes.

    Args:
        source: the name of a published system of ours, such as "ezaudio_xl"; an exported system directory; or a
            diffusion training checkpoint (`.ckpt`).
        with_codec: False leaves the codec out, which training on cached latents does not need.

    Raises CheckpointError where something is missing, was altered, or does not belong together.
    """
    if (name := published_name(source)) is not None:
        system = load_published(name)
        if not isinstance(system, System):
            raise CheckpointError(f"{name} is a pipeline of diffusers, which only generates; give a system of ours")
        return system
    path = Path(source)
    if path.is_dir():
        return _load_directory(path, with_codec)
    if not path.exists() and path.suffix != ".ckpt":
        raise CheckpointError(
            f"system={source} names neither a published system (configs/published) nor a file or folder that exists"
        )
    return _load_training(path, with_codec)


def load_published(
    name: str,
    hub_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """What is published under a name in `configs/published`: a `System`, or an `AudioPipeline` of diffusers.

    Args:
        hub_dir: a folder laid out as the hub is, instead of the network.
        cache_dir: where converted weights are kept; None is `default_cache_dir`.
        overrides: as for `published_config`.

    Raises CheckpointError at once where a file is neither here nor to be had.
    """
    hub = Hub(Path(hub_dir).expanduser() if hub_dir else None)
    loaded = published_loader(name, overrides).load(hub, Path(cache_dir or default_cache_dir()).expanduser())
    if not isinstance(loaded, System):
        return loaded
    return replace(loaded, trained_seconds=published_config(name, overrides).sampling.get("duration_seconds"))


def published_loader(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """What `foley.system.published` loads the system of that name by; nothing is looked for yet."""
    return instantiate(published_config(name, overrides).published)


def codec_hashes(source: str | Path) -> set[str]:
    """The hashes of the codec whose latents the system `source` generates, empty where it does not say.

    A directory may hold a rounded copy of the codec that the system was trained on; latents of both fit.
    """
    if (name := published_name(source)) is not None:
        codec = published_loader(name).load_codec(Hub(), Path(default_cache_dir()).expanduser())
        return {hash_module(codec)}
    path = Path(source)
    if path.is_dir():
        trained_on = json.loads((path / SYSTEM_FILE).read_text(encoding="utf-8"))["codec_hash"]
        return {trained_on, hash_module(load_component(_parts(path)["codec"]))}
    return {read_training_checkpoint(path)[FOLEY_KEY].get("codec_hash")} - {None}


def save_system(system: System, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write a system directory; floating weights are stored as `dtype` where one is given.

    A frozen text encoder is stored as its config alone: its weights are published elsewhere. `system.json` is
    written last, so that an interrupted export is not mistaken for a system.
    """
    for name in COMPONENTS:
        module, config = system.modules[name], system.configs[name]
        if name == "text" and not module.trainable:
            write_json(directory / name / CONFIG_FILE, dict(config))
        else:
            save_component(module, config, directory / name, dtype, _files_in(config))
    weights = {file.parent.name: hash_file(file) for file in sorted(directory.glob(f"*/{WEIGHTS_FILE}"))}
    info = {
        "format": SYSTEM_FORMAT,
        **{name: dict(system.configs[name]) for name in _METHODS if name in system.configs},
        "codec_hash": hash_module(system.modules["codec"]),
        **({} if system.trained_seconds is None else {"trained_seconds": system.trained_seconds}),
        "weights_sha256": weights,
    }
    if system.captions:
        write_text(directory / CAPTIONS_FILE, "\n".join(system.captions) + "\n")
    write_json(directory / SYSTEM_FILE, info)


def share_parts(directory: Path, original: Path) -> list[str]:
    """Drop what the system in `directory` has exactly as that in `original`, and refer to it there; returns the names.

    The two folders must then stay where they are to each other. A student shares all but the denoiser with its teacher.
    """
    file = directory / SYSTEM_FILE
    names = [name for name in (*COMPONENTS, CAPTIONS_FILE) if _same_content(directory / name, original / name)]
    info = json.loads(file.read_text(encoding="utf-8"))
    info["shared"] = {name: os.path.relpath(original / name, directory) for name in names}
    write_json(file, info)
    for name in names:
        own = directory / name
        shutil.rmtree(own) if own.is_dir() else own.unlink()
    return names


def student_of(path: Path) -> Path:
    """The student that ships inside the system at `path`; raises CheckpointError where there is none."""
    student = path / STUDENT_FOLDER
    if not (student / SYSTEM_FILE).is_file():
        raise CheckpointError(f"{path} holds no {STUDENT_FOLDER}/{SYSTEM_FILE}: no student of this system is exported")
    return student


def _same_content(first: Path, second: Path) -> bool:
    contents = [
        {file.relative_to(path): hash_file(file) for file in [path, *path.rglob("*")] if file.is_file()}
        for path in (first, second)
    ]
    return bool(contents[0]) and contents[0] == contents[1]


def _parts(directory: Path) -> dict[str, Path]:
    """Where the components and the captions of the system in `directory` lie."""
    shared = json.loads((directory / SYSTEM_FILE).read_text(encoding="utf-8")).get("shared", {})
    return {name: directory / shared.get(name, name) for name in (*COMPONENTS, CAPTIONS_FILE)}


def _assemble(
    modules: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    source: str,
    captions: Sequence[str] = (),
    trained_seconds: float | None = None,
) -> System:
    methods = {name: build_component(configs[name], source) for name in _METHODS if name in configs}
    return System(modules, configs=configs, captions=captions, trained_seconds=trained_seconds, **methods)


def _load_directory(directory: Path, with_codec: bool) -> System:
    file = directory / SYSTEM_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist: {directory} is not an exported system (scripts/export_system.py)"
        )
    info = current_config(json.loads(file.read_text(encoding="utf-8")))
    if info.get("format") != SYSTEM_FORMAT:
        raise CheckpointError(
            f"{file}: format {info.get('format')!r} is not {SYSTEM_FORMAT!r}; export the system again"
        )
    parts = _parts(directory)
    for name, expected in info["weights_sha256"].items():
        weights = parts[name] / WEIGHTS_FILE
        if not weights.is_file() or hash_file(weights) != expected:
            raise CheckpointError(f"{weights} is missing or is not the file that {file} describes (SHA-256 {expected})")
    modules, configs = {}, {name: info[name] for name in _METHODS if name in info}
    for name in COMPONENTS if with_codec else (name for name in COMPONENTS if name != "codec"):
        configs[name] = read_config(parts[name])
        stored = (parts[name] / WEIGHTS_FILE).is_file()
        modules[name] = load_component(parts[name]) if stored else build_component(configs[name], str(directory))
    captions = parts[CAPTIONS_FILE]
    lines = captions.read_text(encoding="utf-8").splitlines() if captions.is_file() else []
    return _assemble(modules, configs, str(file), lines, info.get("trained_seconds"))


def _load_training(path: Path, with_codec: bool) -> System:
    checkpoint = read_training_checkpoint(path)
    metadata = checkpoint[FOLEY_KEY]
    configs = dict(metadata["components"])
    absent = [name for name in ("denoiser", "normaliser", "text", "process") if configs.get(name) is None]
    if absent:
        raise CheckpointError(f"{path} is no text-to-audio model: it holds no {', '.join(absent)}")
    modules = {name: component_from_training(checkpoint, name, str(path)) for name in ("denoiser", "normaliser")}
    if isinstance(modules["denoiser"], AdaptedDenoiser):
        modules["denoiser"], configs["denoiser"] = modules["denoiser"].folded(), configs["denoiser"]["denoiser"]
    if any(key.startswith("text.") for key in checkpoint["state_dict"]):
        modules["text"] = component_from_training(checkpoint, "text", str(path))
    else:
        modules["text"] = build_component(configs["text"], str(path)).eval()
    if with_codec:
        modules["codec"], configs["codec"] = _load_codec(metadata, path)
    return _assemble(modules, configs, str(path), trained_seconds=metadata.get("trained_seconds"))


def _load_codec(metadata: Mapping[str, Any], source: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """The codec whose latents the denoiser was trained on, and its config."""
    if not metadata.get("codec_dir"):
        raise CheckpointError(
            f"{source} does not say which codec it was trained on (`codec_dir`); train with `codec_path=` set"
        )
    path = locate(metadata["codec_dir"])
    if not path.exists():
        raise CheckpointError(f"{source} was trained on the codec at {path}, which does not exist")
    codec = load_trained(path, "codec")
    actual, expected = hash_module(codec), metadata["codec_hash"]
    if actual != expected:
        raise CheckpointError(
            f"{source} was trained on latents of the codec {expected[:12]}, but {path} now holds {actual[:12]}; "
            "put the original codec back, or encode the latents and train again"
        )
    return codec, trained_config(path, "codec")


def _files_in(config: Mapping[str, Any]) -> dict[str, Path]:
    """The config's values that are files, such as a vocabulary; they travel with the component."""
    files = {key: locate(value) for key, value in config.items() if isinstance(value, str)}
    return {key: file for key, file in files.items() if file.is_file()}
