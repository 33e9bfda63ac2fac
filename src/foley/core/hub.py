"""Where published files come from, and go to: the Hugging Face hub, its cache here, or a folder laid out like it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from foley.core.components import CheckpointError
from foley.core.config import default_hub_dir


def load_pretrained(
    from_pretrained: Callable[..., Any],
    name_or_path: str | Path,
    options: Mapping[str, Any],
    error_type: type[Exception],
    mend: str,
    repository: str | None = None,
) -> Any:
    """Call a loader of transformers, whose many ways to say that files are missing become one error.

    Args:
        mend: what else helps: "give a local directory as ...".
        repository: on the hub, where `name_or_path` may be a folder.

    Raises:
        error_type: files are missing or do not fit; it says where to fetch them.
    """
    try:
        return from_pretrained(_in_hub_folder(name_or_path), **options)
    except (OSError, ValueError, ImportError) as error:
        source = repository or name_or_path
        revision = f" (revision {options['revision']!r})" if "revision" in options else ""
        raise error_type(
            f"{str(name_or_path)!r}{revision} cannot be loaded: config.json, model.safetensors and the files of the "
            "tokenizer or processor are not all on this machine. "
            f"Source: https://huggingface.co/{source}. Fetch it where there is a network (`hf download {source}`), or "
            f"{mend}. Cause: {(str(error).splitlines() or ['unknown'])[0]}"
        ) from error


def _in_hub_folder(name_or_path: str | Path) -> str | Path:
    """The model's folder in FOLEY_HUB_DIR, where it is there."""
    folder = default_hub_dir()
    here = name_or_path if folder is None else folder / name_or_path
    return here if Path(here).is_dir() else name_or_path


_ANSWER_SECONDS = 3.0
logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request of the library


class HubError(RuntimeError):
    """What could not be put on the hub; the message names it, and what helps."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face Hub behind its cache on this machine, or a local folder laid out like it.

    Args:
        directory: holds `<owner>/<repository>/<file>`, and nothing is looked for elsewhere; by default FOLEY_HUB_DIR.
            None asks the cache, then the network.
    """

    directory: Path | None = field(default_factory=default_hub_dir)

    def file(self, repository: str, name: str, revision: str | None = None) -> Path:
        """File `name` of `repository`, downloaded where necessary; raises CheckpointError where it cannot be had.

        `revision` is a branch, tag or commit.
        """
        if self.directory is not None:
            path = self.directory / repository / name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} does not exist: hub_dir={self.directory}, or FOLEY_HUB_DIR, must hold {name} of "
                    f"https://huggingface.co/{repository} there"
                )
            return path
        try:
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            self.require_network(repository, name, name, revision)
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except (HTTPError, OSError) as error:
            raise _unavailable(repository, name, error) from error

    def folder(self, repository: str, wanted: Sequence[str], probe: str, revision: str | None = None) -> Path:
        """The files of `repository` that match the patterns `wanted`, as they are now, or else as they were last.

        Args:
            probe: a file that it must have.
            revision: branch, tag or commit.

        Raises CheckpointError where they cannot be had, here or there.
        """
        if self.directory is not None:
            return self.file(repository, probe).parent
        unreachable = None
        try:
            get_hf_file_metadata(hf_hub_url(repository, probe, revision=revision), timeout=_ANSWER_SECONDS)
        except (HTTPError, OSError) as error:
            unreachable = error
        try:
            here_alone = unreachable is not None
            patterns = list(wanted)
            return Path(
                snapshot_download(repository, revision=revision, local_files_only=here_alone, allow_patterns=patterns)
            )
        except (HTTPError, OSError) as error:
            raise _unavailable(repository, probe, unreachable or error) from error

    def upload(self, repository: str, files: Mapping[str, Path | bytes], message: str, private: bool = False) -> str:
        """Put `files`, by their names there, into `repository` in one commit; returns its address.

        The repository is made where there is none. Raises HubError where the hub refuses, or this is a folder.
        """
        if self.directory is not None:
            raise HubError(f"hub_dir={self.directory} stands for the hub, and takes nothing; leave FOLEY_HUB_DIR out")
        additions = [
            CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
        ]
        try:
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.create_commit(repository, additions, commit_message=message).commit_url)
        except (HTTPError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise HubError(
                f"{repository} could not be written on the hub ({reason}); "
                "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
            ) from error

    def require_network(self, repository: str, probe: str, wanted: str, revision: str | None = None) -> None:
        """Raise CheckpointError, which says how to get the files `wanted`, unless the hub knows file `probe`.

        Asked before a download because the libraries go on trying for a minute where there is no network.
        """
        try:
            get_hf_file_metadata(hf_hub_url(repository, probe, revision=revision), timeout=_ANSWER_SECONDS)
        except (HTTPError, OSError) as error:
            raise _unavailable(repository, wanted, error) from error


def _unavailable(repository: str, wanted: str, cause: Exception) -> CheckpointError:
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    return CheckpointError(
        f"{wanted} of {repository} is not on this machine and cannot be fetched ({reason}). "
        f"Source: https://huggingface.co/{repository}. Fetch it where there is a network "
        f"(`hf download {repository} {wanted}`), or put it at DIR/{repository}/{wanted} and give hub_dir=DIR, "
        "or the variable FOLEY_HUB_DIR=DIR"
    )
