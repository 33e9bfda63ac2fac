"""Models that transformers loads from the Hugging Face cache or a local folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
        return from_pretrained(name_or_path, **options)
    except (OSError, ValueError, ImportError) as error:
        source = repository or name_or_path
        revision = f" (revision {options['revision']!r})" if "revision" in options else ""
        raise error_type(
            f"{str(name_or_path)!r}{revision} cannot be loaded: config.json, model.safetensors and the files of the "
            "tokenizer or processor are not all on this machine. "
            f"Source: https://huggingface.co/{source}. Fetch it where there is a network (`hf download {source}`), or "
            f"{mend}. Cause: {(str(error).splitlines() or ['unknown'])[0]}"
        ) from error
