"""Captions by a language model that is told which sounds there are, and when: EzAudio's AS-SL-GPT4-Caps."""

from collections.abc import Sequence
from typing import Any

from foley.data.annotating import Fault, ManifestRow
from foley.data.captioning.answers import Answer, captioned
from foley.data.captioning.chat import ChatCaptioner
from foley.data.events import Event, describe_events

_QUOTES = "\"'“”"


class StrongLabelCaptioner(ChatCaptioner):
    """Asks an endpoint for a caption of each row's `events` (lists of start and end in seconds, and a name).

    Args:
        chat: as for `ChatCaptioner`.
        clip_seconds: length of rows that do not say theirs.
    """

    source = "strong_labels"

    def __init__(self, *chat: Any, clip_seconds: float = 10.0, **options: Any) -> None:
        super().__init__(*chat, **options)
        self.clip_seconds = clip_seconds

    def prompts(self, row: ManifestRow) -> Sequence[str] | Fault:
        """What the model is told of one clip."""
        seconds = row.get("duration_seconds") or self.clip_seconds
        try:
            events = [Event(float(start), float(end), str(name)) for start, end, name in row.get("events") or []]
            return [f"Clip of {seconds:.1f} s: {describe_events(events, seconds)}."]
        except (TypeError, ValueError, OverflowError) as error:
            return Fault(
                f"`events` must be a list of [start, end, name], as AudioSet's strong labels give it ({error})"
            )

    def result(self, row: ManifestRow, prompts: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any] | Fault:
        """The answer, without quotes around it."""
        return captioned(answers[0].text.strip().strip(_QUOTES), self.identity, description=prompts[0])
