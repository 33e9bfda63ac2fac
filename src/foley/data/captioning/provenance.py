"""Where a caption comes from, in the same words for every way to make one."""

import hashlib
from datetime import UTC, datetime
from typing import Any


def identity(source: str, model: str, prompt: str) -> dict[str, str]:
    """What all captions of a run have in common; the prompt as SHA-256 of its text."""
    return {"source": source, "model": model, "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest()}


def captioned(caption: str, identity: dict[str, str], **more: Any) -> dict[str, Any]:
    """A result: the caption on one line, with its identity and the time at which it was made (UTC)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"caption": " ".join(caption.split()), **identity, "date": now, **more}
