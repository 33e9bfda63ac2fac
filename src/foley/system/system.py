"""A text-to-audio system: published, an exported directory, or a training checkpoint and the codec it names.

An exported directory holds a folder for each component and `system.json`: the process, the hash of every file that is
read, and a hash of all that, so that no config or weights are taken for others.
"""

import os
import shutil
from collections.abc import Mapping, Sequence, Set
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
    check_targets,
    component_class,
    current_config,
    load_component,
    read_config,
    rebuild_component,
    save_component,
)
from foley.core.config import PIPELINE_INDEX, default_cache_dir, locate
from foley.core.files import write_json, write_text
from foley.core.hashing import hash_file, hash_json, hash_module
from foley.core.hub import Hub
from foley.core.logs import get_logger
from foley.core.numbers import POSITIVE
from foley.core.pipelines import system_config
from foley.core.reading import read_json, reading
from foley.diffusion.consistency import Consistency
from foley.diffusion.process import DiffusionProcess
from foley.models.lora import AdaptedDenoiser
from foley.models.text import StoredText
from foley.system.checkpoint import (
    A_SYSTEM,
    CAPTIONS_FILE,
    COMPONENTS,
    EXPORT_AGAIN,
    FOLEY_KEY,
    SYSTEM_FILE,
    component_from_training,
    describe_training_checkpoint,
    fetched,
    find_weights,
    load_trained,
    locate_source,
    published_loader,
    published_source,
    system_parts,
    trained_config,
)

SYSTEM_FORMAT = "foley-system/2"
_UNBOUND_FORMAT = "foley-system/1"  # of version 0.1, whose configs no hash binds
STUDENT_FOLDER = "student"
_METHODS = ("process", "consistency")
_log = get_logger(__name__)


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
    configs["normaliser"] = identity_normaliser(composed.codec.latent_channels)
    return build_system(configs)


def load_system(
    source: str | Path,
    with_codec: bool = True,
    codec_path: str | Path | None = None,
    text_dir: str | None = None,
) -> System:
    """Read a system by what `system=` takes.

    Args:
        source: the name of a published system of ours, such as "ezaudio_xl"; the folder of an exported system or of a
            diffusion run; a training checkpoint (`.ckpt`); OWNER/NAME of a system on the hub; or a pipeline's folder
            that `foley.system.diffusers_folder` wrote.
        with_codec: False leaves the codec out, which training on cached latents does not need.
        codec_path: a codec, as `load_trained` takes it, in place of the one that a folder or checkpoint names.
        text_dir: a store of embeddings of its frozen text encoder, which is not loaded then (`StoredText`).

    Raises CheckpointError where something is missing, was altered, or does not belong together; TextStoreError for
    embeddings of another encoder.
    """
    if (name := published_source(source)) is not None:
        if codec_path is not None:
            raise CheckpointError(f"codec_path={codec_path}: {name} is published with its codec; leave codec_path out")
        system = load_published(name, overrides={"published": {"text_dir": text_dir}} if text_dir else None)
        if not isinstance(system, System):
            raise CheckpointError(f"{name} is a pipeline of diffusers, which only generates; give a system of ours")
        return system
    source = fetched(source)
    if (Path(source).expanduser() / PIPELINE_INDEX).is_file() and codec_path is None and text_dir is None:
        from foley.system.diffusers_folder import load_pipeline  # which knows this module

        return load_pipeline(Path(source).expanduser(), with_codec)
    path = find_weights(source, option="system=")
    if not path.is_dir():
        return _load_training(path, with_codec, codec_path, text_dir)
    if not (path / SYSTEM_FILE).is_file():
        raise CheckpointError(
            f"{path / SYSTEM_FILE} does not exist: {path} is a component, not an exported system "
            "(scripts/export_system.py)"
        )
    return _load_directory(path, with_codec, codec_path, text_dir)


def load_published(
    system: str | Path,
    hub_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """What is published under a name: a `System`, or an `AudioPipeline` of diffusers.

    Args:
        system: a name in `configs/published`, or a pipeline's folder or its name on the hub.
        hub_dir: a folder laid out as the hub is, instead of the network; None is FOLEY_HUB_DIR, or else the network.
        cache_dir: where converted weights are kept; None is `default_cache_dir`.
        overrides: as for `published_config`.

    Raises CheckpointError at once where a file is neither here nor to be had.
    """
    described = system_config(system, overrides, hub_dir)
    if described is None:
        raise CheckpointError(f"{system} names nothing published, neither in configs/published nor on the hub")
    hub = Hub(Path(hub_dir).expanduser()) if hub_dir else Hub()
    loaded = instantiate(described.published).load(hub, Path(cache_dir or default_cache_dir()).expanduser())
    if not isinstance(loaded, System):
        return loaded
    return replace(loaded, trained_seconds=described.sampling.get("duration_seconds"))


def codec_hashes(source: str | Path) -> set[str]:
    """The hashes of the codec whose latents the system `source` generates, empty where it does not say.

    A directory may hold a rounded copy of the codec that the system was trained on; latents of both fit.
    """
    if published_source(source) is not None:
        return {hash_module(load_trained(source, "codec"))}
    path = find_weights(source)
    if path.is_dir():
        return {_read_info(path)["codec_hash"], hash_module(load_component(system_parts(path)["codec"]))}
    return {describe_training_checkpoint(path)[FOLEY_KEY].get("codec_hash")} - {None}


def hashes_of_codec(codec_path: str | Path) -> set[str]:
    """Of the codec at `codec_path`, and of the one that it is a rounded copy of, in a system's folder."""
    trained = _trained_hash(codec_path)
    return {hash_module(load_trained(codec_path, "codec")), *([] if trained is None else [trained])}


def read_weights(source: str | Path, own: Mapping[str, Mapping[str, Any]], codec_hash: str | None) -> dict[str, Any]:
    """What `ckpt=` starts a run from, in the form of a training checkpoint: `state_dict`, and what `FOLEY_KEY` says.

    Of a training checkpoint the tensors have no values yet: `filled` reads them from its `path`, which is else None.

    A denoiser comes with its normaliser, without which its weights mean nothing: that of its system, or the identity
    that published weights were trained with. Of what is published, only what trains is read.

    Args:
        source: anything that `find_weights` takes, a published name, or OWNER/NAME of a system on the hub.
        own: the run's component configs by name, by which the folder of a lone component is known.
        codec_hash: of the codec of the run's latents; a system counts as trained on it where it holds that codec.

    Raises CheckpointError as `load_system` does, and where the run has no such component.
    """
    if (name := published_source(source)) is not None:
        modules = {part: load_trained(source, part) for part in ("denoiser", "normaliser")}
        return _as_checkpoint(modules, published_loader(name).configs, codec_hash, codec_hashes(source))
    source = fetched(source)
    path = find_weights(source, option="ckpt=")
    if not path.is_dir():
        return {**describe_training_checkpoint(path), "path": path}
    if not (path / SYSTEM_FILE).is_file():
        return _read_component(path, own, codec_hash)
    system = load_system(source, with_codec=False)
    kept = [name for name in COMPONENTS if name != "codec" and getattr(system.modules[name], "trainable", True)]
    modules = {name: system.modules[name] for name in kept}
    return _as_checkpoint(modules, system.configs, codec_hash, codec_hashes(source))


def _read_component(path: Path, own: Mapping[str, Mapping[str, Any]], codec_hash: str | None) -> dict[str, Any]:
    """A lone component, and of a denoiser the normaliser that belongs to it."""
    name, config = _own_name(path, own)
    modules, configs = {name: load_component(path)}, {name: config}
    if name != "denoiser":
        return _as_checkpoint(modules, configs, None, set())
    if (path.parent / SYSTEM_FILE).is_file():
        beside = system_parts(path.parent)["normaliser"]
        modules["normaliser"], configs["normaliser"] = load_component(beside), read_config(beside)
        return _as_checkpoint(modules, configs, codec_hash, codec_hashes(path.parent))
    _log.warning("%s is a denoiser alone: latents stay as the codec gives them, as in published training", path)
    configs["normaliser"] = identity_normaliser(config["latent_channels"])
    modules["normaliser"] = build_component(configs["normaliser"])
    return _as_checkpoint(modules, configs, codec_hash, {codec_hash})  # nothing says that it is of another codec


def identity_normaliser(channels: int) -> dict[str, Any]:
    """The config of a normaliser that leaves latents as they are, until it is set."""
    return {"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": channels}


def _as_checkpoint(
    modules: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    codec_hash: str | None,
    known_hashes: Set[str | None],
) -> dict[str, Any]:
    """Modules in the form of a training checkpoint, of the codec `codec_hash` where that is one of the known ones."""
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    described: dict[str, Any] = {"components": {name: dict(config) for name, config in configs.items()}}
    if known_hashes:
        described["codec_hash"] = codec_hash if codec_hash in known_hashes else min(map(str, known_hashes))
    return {"state_dict": state, FOLEY_KEY: described, "path": None}


def _own_name(path: Path, own: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    config = read_config(path)
    for name, component in own.items():
        if component_class(str(component.get("_target_"))) is component_class(str(config.get("_target_"))):
            return name, config
    raise CheckpointError(f"{path} holds a {config.get('_target_')}, which this run does not train: {', '.join(own)}")


def save_system(system: System, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write a system directory; floating weights are stored as `dtype` where one is given.

    A frozen text encoder is stored as its config alone: its weights are published elsewhere. `system.json` is
    written last, so that an interrupted export is not mistaken for a system.
    """
    for name in COMPONENTS:
        module, config = system.modules[name], system.configs[name]
        if name == "text" and not module.trainable:
            write_json(directory / name / CONFIG_FILE, dict(config))
            (directory / name / WEIGHTS_FILE).unlink(missing_ok=True)  # of an earlier export
        else:
            save_component(module, config, directory / name, dtype, _assets(module, config))
    captions = directory / CAPTIONS_FILE
    captions.unlink(missing_ok=True)
    if system.captions:
        write_text(captions, "\n".join(system.captions) + "\n")
    parts = {name: directory / name for name in (*COMPONENTS, CAPTIONS_FILE)}
    info = {
        "format": SYSTEM_FORMAT,
        **{name: dict(system.configs[name]) for name in _METHODS if name in system.configs},
        "codec_hash": hash_module(system.modules["codec"]),
        **({} if system.trained_seconds is None else {"trained_seconds": system.trained_seconds}),
        "files_sha256": {name: hash_file(file) for name, file in _files_read(parts).items()},
    }
    write_json(directory / SYSTEM_FILE, {**info, "sha256": _bound_hash(info)})


def check_system(directory: Path) -> list[Path]:
    """Compare every file of the system in `directory`, and of the student inside it, with its hash; returns both.

    Raises CheckpointError where there is no system, or it is not whole.
    """
    if not (directory / SYSTEM_FILE).is_file():
        raise CheckpointError(f"{directory / SYSTEM_FILE} does not exist: no exported system is there (foley export)")
    student = directory / STUDENT_FOLDER
    found = [directory, *([student] if (student / SYSTEM_FILE).is_file() else [])]
    for each in found:
        _check_files(each / SYSTEM_FILE, _read_info(each), system_parts(each))
    return found


def share_parts(directory: Path, original: Path) -> list[str]:
    """Drop what the system in `directory` has exactly as that in `original`, and refer to it there; returns the names.

    The two folders must then stay where they are to each other. A student shares all but the denoiser with its teacher.
    """
    file = directory / SYSTEM_FILE
    names = [name for name in (*COMPONENTS, CAPTIONS_FILE) if _same_content(directory / name, original / name)]
    info = read_json(file, A_SYSTEM, EXPORT_AGAIN)
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


def _assemble(
    modules: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    source: str,
    captions: Sequence[str] = (),
    trained_seconds: float | None = None,
) -> System:
    methods = {name: rebuild_component(configs[name], source) for name in _METHODS if name in configs}
    return System(modules, configs=configs, captions=captions, trained_seconds=trained_seconds, **methods)


def _load_directory(directory: Path, with_codec: bool, codec_path: str | Path | None, text_dir: str | None) -> System:
    file, info, parts = directory / SYSTEM_FILE, _read_info(directory), system_parts(directory)
    _check_files(file, info, parts)
    modules, configs = {}, {name: info[name] for name in _METHODS if name in info}
    for name in COMPONENTS if with_codec else (name for name in COMPONENTS if name != "codec"):
        if name == "codec" and codec_path is not None:
            modules[name], configs[name] = _matching_codec(codec_path, codec_hashes(directory), str(directory))
            continue
        configs[name] = read_config(parts[name])
        stored = name == "text" and text_dir is not None
        modules[name] = StoredText(str(text_dir), configs[name]) if stored else _load_part(parts[name], configs[name])
    captions = parts[CAPTIONS_FILE]
    with reading(captions, "the captions of a system", EXPORT_AGAIN):
        lines = captions.read_text(encoding="utf-8").splitlines() if captions.is_file() else []
    return _assemble(modules, configs, str(file), lines, info.get("trained_seconds"))


def _load_part(part: Path, config: Mapping[str, Any]) -> nn.Module:
    """A component with its weights; only a frozen text encoder, whose weights lie elsewhere, has none in the folder."""
    if (part / WEIGHTS_FILE).is_file():
        return load_component(part)  # type: ignore[no-any-return]
    module: nn.Module = rebuild_component(config, str(part / CONFIG_FILE)).eval()
    if getattr(module, "trainable", True):
        raise CheckpointError(f"{part / WEIGHTS_FILE} does not exist: {part.name} would be untrained; {EXPORT_AGAIN}")
    return module


def _read_info(directory: Path) -> dict[str, Any]:
    """What `system.json` says, with `files_sha256` in older formats too; targets are named as today, and checked."""
    file = directory / SYSTEM_FILE
    with reading(file, A_SYSTEM, EXPORT_AGAIN):
        stored = read_json(file, A_SYSTEM, EXPORT_AGAIN)
        info: dict[str, Any] = dict(current_config(stored))
        check_targets({name: info[name] for name in _METHODS if name in info}, str(file))
        if info.get("format") == _UNBOUND_FORMAT:
            _log.warning("%s is of version 0.1: no hash binds its configs; %s", directory, EXPORT_AGAIN)
            weights = info["weights_sha256"].items()
            return {**info, "files_sha256": {f"{name}/{WEIGHTS_FILE}": digest for name, digest in weights}}
        if info.get("format") != SYSTEM_FORMAT:
            raise CheckpointError(f"{file}: format {info.get('format')!r} is not {SYSTEM_FORMAT!r}; {EXPORT_AGAIN}")
        if _bound_hash(stored) != stored["sha256"]:
            raise CheckpointError(
                f"{file} was changed after its export (its `sha256` is of other values); {EXPORT_AGAIN}"
            )
    return info


def _bound_hash(info: Mapping[str, Any]) -> str:
    """Of what `system.json` says of the system itself; where shared parts lie, for one, may change."""
    bound = (*_METHODS, "codec_hash", "trained_seconds", "files_sha256")
    return hash_json({name: info[name] for name in bound if name in info})


def _files_read(parts: Mapping[str, Path]) -> dict[str, Path]:
    """Every file that loading these parts reads, by its name in `files_sha256`, such as "codec/config.json"."""
    files: dict[str, Path] = {}
    for name in COMPONENTS:
        assets = [Path(value) for value in read_config(parts[name]).values() if isinstance(value, str)]
        inside = [file for file in assets if file.is_absolute() and file.parent == parts[name].absolute()]
        own = [parts[name] / CONFIG_FILE, parts[name] / WEIGHTS_FILE, *inside]
        files |= {f"{name}/{file.name}": file for file in own}
    files[CAPTIONS_FILE] = parts[CAPTIONS_FILE]
    return {name: file for name, file in files.items() if file.is_file()}


def _check_files(file: Path, info: Mapping[str, Any], parts: Mapping[str, Path]) -> None:
    """Raise CheckpointError unless every file is the one that `file` describes, and none is read that it does not."""
    recorded: Mapping[str, str] = info["files_sha256"]
    for name, expected in recorded.items():
        part, _, inside = name.partition("/")
        path = parts[part] / inside
        if not path.is_file() or hash_file(path) != expected:
            raise CheckpointError(f"{path} is missing or is not the file that {file} describes (SHA-256 {expected})")
    unbound = [path for name, path in _files_read(parts).items() if name not in recorded]
    if info["format"] == _UNBOUND_FORMAT:
        unbound = [path for path in unbound if path.name == WEIGHTS_FILE]
    if foreign := [str(path) for path in unbound]:
        raise CheckpointError(f"{file} holds no SHA-256 of {', '.join(foreign)}; {EXPORT_AGAIN}")


def _load_training(path: Path, with_codec: bool, codec_path: str | Path | None, text_dir: str | None) -> System:
    checkpoint = describe_training_checkpoint(path)
    metadata = checkpoint[FOLEY_KEY]
    configs = dict(metadata["components"])
    absent = [name for name in ("denoiser", "normaliser", "text", "process") if configs.get(name) is None]
    if absent:
        raise CheckpointError(f"{path} is no text-to-audio model: it holds no {', '.join(absent)}")
    codec = _load_codec(metadata, path, codec_path) if with_codec else None  # before the text encoder, which is slow
    modules = {name: component_from_training(checkpoint, name, path) for name in ("denoiser", "normaliser")}
    if isinstance(modules["denoiser"], AdaptedDenoiser):
        modules["denoiser"], configs["denoiser"] = modules["denoiser"].folded(), configs["denoiser"]["denoiser"]
    if text_dir is not None:
        modules["text"] = StoredText(text_dir, configs["text"])
    elif any(key.startswith("text.") for key in checkpoint["state_dict"]):
        modules["text"] = component_from_training(checkpoint, "text", path)
    else:
        modules["text"] = rebuild_component(configs["text"], str(path)).eval()
    if codec is not None:
        modules["codec"], configs["codec"] = codec
    return _assemble(modules, configs, str(path), trained_seconds=metadata.get("trained_seconds"))


def _load_codec(
    metadata: Mapping[str, Any], source: Path, codec_path: str | Path | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The codec whose latents the denoiser was trained on, and its config."""
    if codec_path is None:
        if not metadata.get("codec_dir"):
            raise CheckpointError(
                f"{source} does not say which codec it was trained on (`codec_dir`); give it: codec_path=CODEC"
            )
        codec_path = locate_source(metadata["codec_dir"])
        if isinstance(codec_path, Path) and not codec_path.exists():
            raise CheckpointError(
                f"{source} was trained on the codec at {codec_path}, which does not exist; "
                "put it back, or say where it is: codec_path=CODEC"
            )
    digest = metadata.get("codec_hash")
    return _matching_codec(codec_path, set() if digest is None else {digest}, str(source))


def _matching_codec(codec_path: str | Path, expected: Set[str], source: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The codec at `codec_path` and its config; raises CheckpointError unless its hash is one of the `expected`."""
    codec = load_trained(codec_path, "codec")
    actual = hash_module(codec)
    if expected and not expected & {actual, _trained_hash(codec_path)}:
        known = " or ".join(sorted(digest[:12] for digest in expected))
        raise CheckpointError(
            f"{source} was trained on latents of the codec {known}, but {codec_path} holds {actual[:12]}; "
            "give the original codec (codec_path=), or encode the latents and train again"
        )
    return codec, trained_config(codec_path, "codec")


def _trained_hash(codec_path: str | Path) -> str | None:
    """Of the codec that a system's folder holds a rounded copy of."""
    folder = Path(codec_path)
    return _read_info(folder)["codec_hash"] if (folder / SYSTEM_FILE).is_file() else None


def _assets(module: nn.Module, config: Mapping[str, Any]) -> dict[str, Path]:
    """The files that the component's class declares, such as a vocabulary; they travel with the component.

    No other option is looked at: in a config of a stranger it may name any file of this machine.
    """
    files = {key: locate(config[key]) for key in getattr(module, "asset_options", ()) if config.get(key) is not None}
    return {key: file for key, file in files.items() if file.is_file()}
