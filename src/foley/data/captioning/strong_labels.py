"""Captions by a language model that is told which sounds there are, and when: EzAudio's AS-SL-GPT4-Caps."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from foley.data.annotating import Fault, ManifestRow
from foley.data.captioning.answers import AnswerError, EndpointError, captioned, identity
from foley.data.captioning.endpoint import ChatEndpoint, CostEstimate, Prices, estimate_cost
from foley.data.events import Event, describe_events

_QUOTES = "\"'“”"


class StrongLabelCaptioner:
    """Asks an endpoint for a caption of each row's `events` (lists of start and end in seconds, and a name).

    Args:
        instruction: what the model is told once for all.
        concurrency: requests at a time.
        prices: of the endpoint.
        expected_answer_tokens: for the estimate.
        clip_seconds: length of rows that do not say theirs.
    """

    key_fields = ("id",)

    def __init__(
        self,
        endpoint: ChatEndpoint,
        instruction: str,
        prices: Prices,
        concurrency: int = 8,
        expected_answer_tokens: float = 40.0,
        clip_seconds: float = 10.0,
    ) -> None:
        self.endpoint = endpoint
        self.instruction = instruction
        self.prices = prices
        self.expected_answer_tokens = expected_answer_tokens
        self.clip_seconds = clip_seconds
        self.identity = identity("strong_labels", endpoint.model, f"{instruction}\n{endpoint.options}")
        self._threads = ThreadPoolExecutor(concurrency)

    def start(self, world_size: int, device: torch.device) -> None:
        """Take the key from the environment; raises EndpointError."""
        self.endpoint.start(world_size)

    def annotate(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | Fault]:
        """One caption a row; answers that were paid for are kept where the endpoint fails in between."""
        return list(self._threads.map(self._caption, rows))

    def estimate(self, rows: Iterable[ManifestRow]) -> CostEstimate:
        """What captions of `rows` will cost; rows without events cost nothing."""
        users = (user for user in map(self.prompt, rows) if isinstance(user, str))
        return estimate_cost(self.instruction, users, self.expected_answer_tokens, self.prices)

    def prompt(self, row: ManifestRow) -> str | Fault:
        """What the model is told of one clip."""
        seconds = row.get("duration_seconds") or self.clip_seconds
        try:
            events = [Event(float(start), float(end), str(name)) for start, end, name in row.get("events") or []]
            return f"Clip of {seconds:.1f} s: {describe_events(events, seconds)}."
        except (TypeError, ValueError, OverflowError) as error:
            return Fault(
                f"`events` must be a list of [start, end, name], as AudioSet's strong labels give it ({error})"
            )

    def _caption(self, row: ManifestRow) -> dict[str, Any] | Fault:
        prompt = self.prompt(row)
        if isinstance(prompt, Fault):
            return prompt
        try:
            answer = self.endpoint.ask(self.instruction, prompt)
        except AnswerError as error:
            return Fault(str(error), of_service=True)
        except EndpointError as error:
            return Fault(str(error), ends_run=True)
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        return captioned(answer.text.strip().strip(_QUOTES), self.identity, description=prompt, **tokens)
