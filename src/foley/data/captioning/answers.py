"""What a captioner answers, where a caption comes from, and captions put in the place of a manifest's own."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests

from foley.core.files import json_lines
from foley.data.annotating import read_results
from foley.data.manifest import OUR_COLUMNS, ManifestOptions, checked_rows


def identity(source: str, model: str, prompt: str) -> dict[str, str]:
    """What all captions of a run have in common; the prompt as SHA-256 of its text."""
    return {"source": source, "model": model, "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest()}


def captioned(caption: str, identity: dict[str, str], **more: Any) -> dict[str, Any]:
    """A result: the caption on one line, with its identity and the time at which it was made (UTC)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"caption": " ".join(caption.split()), **identity, "date": now, **more}


class EndpointError(RuntimeError):
    """Nothing can be asked of the endpoint: no key, a wrong one, no money, no such model."""


class AnswerError(RuntimeError):
    """No usable answer to this one request."""


class TemporaryError(RuntimeError):
    """Worth another try; `wait_seconds` is what the server asks for."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Answer:
    """Text, and the tokens that were paid for (0 where the server does not count)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_answer(response: requests.Response) -> Answer:
    """The answer in a response; raises TemporaryError where it is none, AnswerError where it is empty or cut."""
    try:
        content = response.json()
        choice = content["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = content.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TemporaryError(f"the answer is not a chat completion ({type(error).__name__}: {error})") from error
    if not isinstance(text, str) or not text.strip():
        raise AnswerError(f"the answer is empty (finish_reason {finish!r})")
    if finish == "length":
        raise AnswerError("the answer was cut at its greatest number of tokens")
    return Answer(text, *tokens)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now; the header gives seconds or a date."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def write_captioned_manifest(
    manifest: Path, output_dir: Path, options: ManifestOptions = OUR_COLUMNS
) -> tuple[Path, int]:
    """Write `output_dir/manifest.jsonl`: the rows of `manifest` that have a caption in `output_dir`, with it.

    Paths, licences and all other fields but captions stay; `captioning` holds model, prompt hash, date and source.
    Rows without a caption are left out.

    Returns:
        The path and the number of rows.
    """
    captions = {result.pop("id"): result for result in read_results(output_dir, ("id", "caption"))}
    written = 0
    path = output_dir / "manifest.jsonl"
    with json_lines(path) as write:
        for _, row in checked_rows(manifest, options):
            if isinstance(row, str) or row["id"] not in captions:
                continue
            made = {**captions[row["id"]]}
            rest = {name: cell for name, cell in row.items() if name not in ("caption", "captions")}
            caption, several = made.pop("caption"), made.pop("captions", None)
            texts = {"caption": caption} if several is None else {"captions": several}
            write({**rest, **texts, "captioning": made})
            written += 1
    return path, written
