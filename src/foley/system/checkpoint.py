"""Weights by any name that an option takes, and training checkpoints: what Lightning wrote of a run.

`ckpt=`, `system=`, `codec_path=` and the like take the same: a training checkpoint (.ckpt), the folder of a run, of a
system, or of a component (a converted published file is one), or the name of a published system. A codec may be a
published file of the Descript Audio Codec or a folder of diffusers' `AutoencoderOobleck`, too, which say so.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from foley.core.components import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    current_config,
    describe_pickle,
    filled,
    load_component,
    load_state,
    read_config,
    read_pickle,
    rebuild_component,
)
from foley.core.config import (
    PIPELINE_INDEX,
    PROJECT_ROOT,
    SYSTEM_FILE,
    default_cache_dir,
    hub_name,
    locate,
    published_config,
    published_name,
)
from foley.core.hub import Hub
from foley.core.pipelines import asked
from foley.core.reading import read_json, reading
from foley.system.convert.conversion import converted_folder
from foley.system.convert.dac import is_dac_file
from foley.system.convert.oobleck import oobleck_folder

FOLEY_KEY = "foley"
"""Entry of a training checkpoint that says how to build the components whose weights it holds."""

CAPTIONS_FILE = "captions.txt"
COMPONENTS = ("denoiser", "text", "codec", "normaliser")
A_SYSTEM, EXPORT_AGAIN = "the description of a system", "export the system again (scripts/export_system.py)"

_LAST = ("checkpoints/last.ckpt", "last.ckpt")
_KINDS = "a training checkpoint (.ckpt), or the folder of a run, of a system or of a component"


SHARED_FILES = ("*.json", "*.safetensors", "*.md", "*.txt", "*.png", "LICENSE*", "LICENCE*", "*.onnx")
"""Patterns of what a system's folder shares on the hub: no pickle and no code."""


def fetched(source: str | Path, hub_dir: str | Path | None = None, revision: str | None = None) -> str | Path:
    """The folder of a system that `source` names on the hub, as it is there now; else `source` itself.

    Raises CheckpointError where it cannot be had.
    """
    if (repository := hub_name(source)) is None:
        return source
    hub = Hub(Path(hub_dir).expanduser()) if hub_dir else Hub()
    # A folder that `foley.system.diffusers_folder` wrote has the index of a pipeline in the place of our file.
    ours, index = (asked(repository, name, hub, revision)[0] for name in (SYSTEM_FILE, PIPELINE_INDEX))
    probe = PIPELINE_INDEX if ours is None and index is not None else SYSTEM_FILE
    return hub.folder(repository, SHARED_FILES, probe, revision)


def find_weights(source: str | Path, component: str | None = None, option: str = "") -> Path:
    """The training checkpoint or the folder that `source` names.

    Args:
        source: a path as the module says, or the weights inside a component's folder.
        component: of a system's folder, the folder of this component; None is that of the system.
        option: that named it, such as "system=", for the error.

    Raises CheckpointError, which says what was looked for.
    """
    path = Path(source).expanduser()
    path = path.parent if path.name == WEIGHTS_FILE else path
    if component == "codec" and is_dac_file(path):
        return converted_folder("dac", path, {}, Path(default_cache_dir()).expanduser())
    if component == "codec" and (published := oobleck_folder(path)) is not None:
        return converted_folder("oobleck", *published, Path(default_cache_dir()).expanduser())
    if path.is_file():
        return path
    if (path / SYSTEM_FILE).is_file():
        return path if component is None else _part(path, component)
    if (path / CONFIG_FILE).is_file():
        return path
    for last in _LAST:
        if (path / last).exists():
            return path / last
    raise CheckpointError(_not_found(f"{option}{source}", path))


def _not_found(source: str, path: Path) -> str:
    if not path.is_dir():
        return (
            f"{source} names neither a published system (configs/published) nor a file or folder that exists; "
            f"give {_KINDS}"
        )
    looked_for = ", ".join((SYSTEM_FILE, CONFIG_FILE, *_LAST))
    return (
        f"{source} holds none of {looked_for}: it is not an exported system, nor a component, nor a run; give {_KINDS}"
    )


def _part(system: Path, component: str) -> Path:
    if component not in COMPONENTS:
        raise CheckpointError(f"{system} is a system, which has no {component!r}, only {', '.join(COMPONENTS)}")
    return system_parts(system)[component]


def system_parts(directory: Path) -> dict[str, Path]:
    """Where the components and the captions of the system in `directory` lie; raises DamagedFileError."""
    file = directory / SYSTEM_FILE
    with reading(file, A_SYSTEM, EXPORT_AGAIN):
        shared = read_json(file, A_SYSTEM, EXPORT_AGAIN).get("shared", {})
        return {name: directory / shared.get(name, name) for name in (*COMPONENTS, CAPTIONS_FILE)}


def published_source(source: str | Path) -> str | None:
    """The name of the published system that `source` names, if any; a `Path` only where nothing lies there."""
    if isinstance(source, Path) and source.exists():
        return None
    return published_name(str(source))


def published_loader(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """What `foley.system.published` loads the system of that name by; nothing is looked for yet."""
    return instantiate(published_config(name, overrides).published)


def noted_source(source: str | Path) -> str:
    """`source` as checkpoints note it: a path as seen from the checkout, or a published name; see `locate_source`."""
    return published_source(source) or os.path.relpath(source, PROJECT_ROOT)


def locate_source(noted: str) -> str | Path:
    """What `noted_source` gave, from wherever the command runs."""
    path = locate(noted)
    return path if path.exists() else published_source(noted) or path


def read_training_checkpoint(path: Path, read: Callable[[Path], Any] = read_pickle) -> dict[str, Any]:
    """A Lightning checkpoint; raises CheckpointError.

    Args:
        read: `describe_pickle` leaves the values of tensors on disk, which `filled` reads.
    """
    with reading(path, "a training checkpoint", "give another one"):
        checkpoint: dict[str, Any] = dict(read(path))
        if FOLEY_KEY not in checkpoint:
            raise CheckpointError(
                f"{path} was not written by foley: it has no `{FOLEY_KEY}` entry; "
                "a published file is converted first (scripts/convert_checkpoint.py)"
            )
        checkpoint[FOLEY_KEY] = dict(current_config(checkpoint[FOLEY_KEY]))
    return checkpoint


def describe_training_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint whose tensors have no values yet, see `describe_pickle`; raises CheckpointError."""
    return read_training_checkpoint(path, describe_pickle)


def component_from_training(checkpoint: Mapping[str, Any], name: str, source: Path) -> Any:
    """Component `name` of the training checkpoint `source` that has been read or described already; in eval mode."""
    module = rebuild_component(_config_of(checkpoint, name, source), str(source))
    prefix = f"{name}."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    load_state(module, filled(state, source), f"{source} [{name}]")
    return module.eval()


def _config_of(checkpoint: Mapping[str, Any], name: str, source: Path) -> dict[str, Any]:
    components: dict[str, dict[str, Any]] = checkpoint[FOLEY_KEY].get("components", {})
    if name not in components:
        raise CheckpointError(f"{source} holds no component {name!r}, only {sorted(components)}")
    return components[name]


def load_trained(source: str | Path, name: str) -> Any:
    """Component `name` of what `source` names (averaged weights where a checkpoint keeps them); in eval mode.

    Raises CheckpointError as `find_weights` does, and where there is no such component.
    """
    if (published := published_source(source)) is not None:
        return _published_component(published, name)
    path = find_weights(source, name, "codec_path=" if name == "codec" else "")
    if path.is_dir():
        return load_component(path)
    return component_from_training(describe_training_checkpoint(path), name, path)


def _published_component(published: str, name: str) -> Any:
    loader, cache = published_loader(published), Path(default_cache_dir()).expanduser()
    known = sorted(getattr(loader, "configs", {}))
    if name not in known or name not in COMPONENTS:
        raise CheckpointError(f"{published} holds no component {name!r} of ours, only {known}")
    return loader.load_component(name, Hub(), cache)


def trained_config(source: str | Path, name: str) -> dict[str, Any]:
    """How to build what `load_trained` gives."""
    if (published := published_source(source)) is not None:
        return dict(published_loader(published).configs[name])
    path = find_weights(source, name)
    return read_config(path) if path.is_dir() else _config_of(describe_training_checkpoint(path), name, path)
