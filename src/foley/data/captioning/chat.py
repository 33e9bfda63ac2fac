"""Captioners that ask a chat endpoint, and the one that structures the captions there are.

Structured captions are those of Make-An-Audio 2 (`foley.core.captions`): which sounds a caption names, and when.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, ClassVar

import torch

from foley.core.captions import plain_caption, read_structured, split_caption, with_structured
from foley.data.annotating import Fault, ManifestRow
from foley.data.captioning.answers import Answer, AnswerError, EndpointError, captioned, identity
from foley.data.captioning.endpoint import ChatEndpoint, CostEstimate, Prices, estimate_cost

_COUNTED = ("prompt_tokens", "completion_tokens")


class ChatCaptioner:
    """An annotator that asks an endpoint once for each of a row's prompts.

    A subclass has a `source`, `prompts` and `result`.

    Args:
        instruction: what the model is told once for all.
        concurrency: rows at a time.
        prices: of the endpoint.
        expected_answer_tokens: for the estimate.
    """

    key_fields = ("id",)
    source: ClassVar[str]

    def __init__(
        self,
        endpoint: ChatEndpoint,
        instruction: str,
        prices: Prices,
        concurrency: int = 8,
        expected_answer_tokens: float = 40.0,
    ) -> None:
        self.endpoint = endpoint
        self.instruction = instruction
        self.prices = prices
        self.expected_answer_tokens = expected_answer_tokens
        self.identity = identity(self.source, endpoint.model, f"{instruction}\n{endpoint.options}")
        self._threads = ThreadPoolExecutor(concurrency)

    def start(self, world_size: int, device: torch.device) -> None:
        """Take the key from the environment; raises EndpointError."""
        self.endpoint.start(world_size)

    def annotate(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | Fault]:
        """One result a row; answers that were paid for are kept where the endpoint fails in between."""
        return list(self._threads.map(self._caption, rows))

    def estimate(self, rows: Iterable[ManifestRow]) -> CostEstimate:
        """What `rows` will cost; those without prompts cost nothing."""
        asked = (prompts for prompts in map(self.prompts, rows) if not isinstance(prompts, Fault))
        return estimate_cost(self.instruction, chain.from_iterable(asked), self.expected_answer_tokens, self.prices)

    def prompts(self, row: ManifestRow) -> Sequence[str] | Fault:
        """What the model is told of a row, in one request each; or why it cannot be asked."""
        raise NotImplementedError

    def result(self, row: ManifestRow, prompts: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any] | Fault:
        """What is made of the answers, one for each prompt."""
        raise NotImplementedError

    def _caption(self, row: ManifestRow) -> dict[str, Any] | Fault:
        prompts = self.prompts(row)
        if isinstance(prompts, Fault):
            return prompts
        try:
            answers = [self.endpoint.ask(self.instruction, prompt) for prompt in prompts]
        except AnswerError as error:
            return Fault(str(error), of_service=True)
        except EndpointError as error:
            return Fault(str(error), ends_run=True)
        tokens = {name: sum(getattr(answer, name) for answer in answers) for name in _COUNTED}
        result = self.result(row, prompts, answers)
        return result if isinstance(result, Fault) else result | tokens


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
