"""Structured captions by a language model, as Make-An-Audio 2 has them: which sounds a caption names, and when."""

from collections.abc import Sequence
from typing import Any

from foley.core.captions import plain_caption, read_structured, split_caption, with_structured
from foley.data.annotating import Fault, ManifestRow
from foley.data.captioning.answers import Answer, captioned
from foley.data.captioning.endpoint import ChatCaptioner


class StructuredCaptioner(ChatCaptioner):
    """Asks an endpoint for the structured form of each caption, which is then written behind it.

    An answer of another form is replaced as published: the whole clip is heard as the caption says. Such results say
    `structured_answers`, how many of the row's captions the model did structure.

    Args:
        endpoint, instruction, prices, concurrency, expected_answer_tokens: as for `ChatCaptioner`.
    """

    source = "structured"

    def prompts(self, row: ManifestRow) -> Sequence[str]:
        """The captions of a clip, one or several, without any structure that they have."""
        return [plain_caption(caption) for caption in row.get("captions") or [row["caption"]]]

    def result(self, row: ManifestRow, prompts: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any] | Fault:
        """The row's captions with their structure; several are in `captions`."""
        found = [read_structured(answer.text.strip().removeprefix("Answer:").rstrip(".")) for answer in answers]
        made = [
            with_structured(caption, structured or split_caption(caption)[1])
            for caption, structured in zip(prompts, found, strict=True)
        ]
        more: dict[str, Any] = {"captions": made} if len(made) > 1 else {}
        structured_answers = len(found) - found.count(None)
        return captioned(made[0], self.identity, structured_answers=structured_answers, **more)
