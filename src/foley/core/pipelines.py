"""What `system=` names beside files of ours: a published name, or a pipeline of diffusers in a folder or on the hub.

A pipeline without a config of its own has that of a published one of its class, such as its steps and guidance scale.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from foley.core.components import CheckpointError
from foley.core.config import CONFIG_DIR, PIPELINE_INDEX, SYSTEM_FILE, hub_name, published_config, published_name
from foley.core.hub import Hub
from foley.core.reading import read_json, reading

OUR_PIPELINE = "FoleyPipeline"
"""The class of a folder of diffusers that holds a system of ours (`foley.system.diffusers_folder`)."""


def system_config(
    system: str | Path, overrides: Mapping[str, Any] | None = None, hub_dir: str | Path | None = None
) -> DictConfig | None:
    """How what `system` names is loaded (`published`), and its defaults (`sampling`); None where it is of ours.

    Args:
        overrides: as for `published_config`.
        hub_dir: a folder laid out as the hub is, instead of the network.

    Raises CheckpointError for a repository that is not to be had, and a pipeline that makes no audio as known here.
    """
    if (name := published_name(system)) is not None:
        return published_config(name, overrides)
    if (repository := hub_name(system)) is not None:
        if (index := _index_on_hub(repository, hub_dir)).name == SYSTEM_FILE:
            return None
    else:
        index, repository = Path(system).expanduser() / PIPELINE_INDEX, str(Path(system).expanduser())
    if not index.is_file() or (pipeline := _pipeline_class(index)) == OUR_PIPELINE:
        return None
    return _config_like(pipeline, repository, overrides)


def _index_on_hub(repository: str, hub_dir: str | Path | None) -> Path:
    """What describes the repository: the index of a pipeline, or the file of a system of ours."""
    hub = Hub(Path(hub_dir).expanduser()) if hub_dir else Hub()
    index, reason = asked(repository, PIPELINE_INDEX, hub)
    if index is None:
        index, _ = asked(repository, SYSTEM_FILE, hub)
    if index is None:
        raise CheckpointError(
            f"system={repository} names no file or folder that exists, and neither a pipeline nor a system on the hub: "
            f"{reason}"
        )
    return index


@lru_cache
def asked(repository: str, name: str, hub: Hub, revision: str | None = None) -> tuple[Path | None, str]:
    """A file, or why there is none; asked once, for several options ask for their defaults."""
    try:
        return hub.file(repository, name, revision), ""
    except CheckpointError as error:
        return None, str(error)


def _pipeline_class(index: Path) -> str:
    with reading(index, "the index of a pipeline", "download it again"):
        named = read_json(index, "the index of a pipeline", "download it again")["_class_name"]
        return str(named[-1] if isinstance(named, list) else named)  # a list names the file of its code first


def _config_like(pipeline: str, repository: str, overrides: Mapping[str, Any] | None) -> DictConfig:
    """The config of the published pipeline of this class, with the weights of another repository or folder."""
    like = published_pipelines()
    if pipeline not in like:
        raise CheckpointError(
            f"system={repository} is a {pipeline}, which is none of the pipelines that are sampled here: "
            f"{', '.join(sorted(like))}"
        )
    own = OmegaConf.create({"published": {"repository": repository}})
    return published_config(like[pipeline], OmegaConf.to_container(OmegaConf.merge(own, overrides or {})))  # type: ignore[arg-type]


@lru_cache
def published_pipelines() -> dict[str, str]:
    """The first name in configs/published of each class of pipelines.

    >>> published_pipelines()["StableAudioPipeline"]
    'stable_audio_open'
    """
    found: dict[str, str] = {}
    for file in sorted((CONFIG_DIR / "published").glob("*.yaml")):
        if pipeline := OmegaConf.select(OmegaConf.load(file), "published.pipeline"):
            found.setdefault(pipeline, file.stem)
    return found


def known_config(
    system: str | Path | None, overrides: Mapping[str, Any] | None = None, hub_dir: str | Path | None = None
) -> DictConfig | None:
    """As `system_config`; None also where it raises, which whoever loads the system is told."""
    try:
        return None if system is None else system_config(system, overrides, hub_dir)
    except CheckpointError:
        return None
