"""The folder of a published pipeline of diffusers: an index, and a folder for each component."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from foley.checkpoint import CheckpointError
from foley.published.hub import Hub

INDEX = "model_index.json"
_WANTED = [INDEX, "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]
_UNWANTED = ["*.fp16.*"]


def pipeline_folder(hub: Hub, repository: str) -> Path:
    """The folder of a pipeline, downloaded where necessary; raises CheckpointError where a file cannot be had."""
    folder = hub.file(repository, INDEX).parent
    absent = _absent(folder)
    if absent and hub.directory is None:
        hub.require_network(repository, INDEX, absent)
        try:
            # Not always the folder of the index: the repository may have changed since that was cached.
            folder = Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        except (HTTPError, OSError) as error:
            raise CheckpointError(f"the download of {repository} broke off: {error}") from error
        absent = _absent(folder)
    if absent:
        raise CheckpointError(
            f"{folder / absent} does not exist, but {folder / INDEX} names it: "
            f"it must be there as on https://huggingface.co/{repository}"
        )
    return folder


def _absent(folder: Path) -> str | None:
    """The first component file that the index asks for and the folder lacks."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    components = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    wanted = [f"{name}/{file}" for name, kind in components.items() for file in _files_of(kind)]
    return next((file for file in wanted if not any(folder.glob(file))), None)


def _files_of(kind: str) -> tuple[str, ...]:
    """Patterns of what a component of this class is stored as."""
    if kind.endswith("Scheduler"):
        return ("scheduler_config.json",)
    if "Token" in kind:
        return ("tokenizer_config.json",)
    if kind.endswith("FeatureExtractor"):
        return ("preprocessor_config.json",)
    return ("config.json", "*.safetensors")
