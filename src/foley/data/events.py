"""Sound events with times, and their description in words: what a language model makes captions of."""

from collections.abc import Sequence
from typing import NamedTuple

_GAP_SECONDS = 0.25
_OVERLAP_SECONDS = 0.05
_THROUGHOUT_SHARE = 0.9


class Event(NamedTuple):
    """One sound from `start_seconds` to `end_seconds` of a clip; sorts by time."""

    start_seconds: float
    end_seconds: float
    name: str


class Run(NamedTuple):
    """Events of one name, one after the other, with no other beginning in between."""

    start_seconds: float
    end_seconds: float
    name: str
    times: int


def describe_events(events: Sequence[Event], duration_seconds: float) -> str:
    """Events in the order of their beginnings: "bark 2 times 0.5-1.2 s; then speech 1.4-4.0 s; meanwhile music ...".

    Events of one name with less than 0.25 s between them are one. "then": the sound begins when all earlier ones are
    over; "meanwhile": while one of them goes on. A sound over 90 % of the clip is there "throughout".

    Raises ValueError where an event ends before it starts, or there is none.
    """
    if not events:
        raise ValueError("a clip without events cannot be described")
    described = ""
    latest_end = 0.0
    for run in _runs(_joined(events)):
        link = (
            "" if not described else "; then " if run.start_seconds >= latest_end - _OVERLAP_SECONDS else "; meanwhile "
        )
        described += link + _phrase(run, duration_seconds)
        latest_end = max(latest_end, run.end_seconds)
    return described


def _joined(events: Sequence[Event]) -> list[Event]:
    last: dict[str, int] = {}
    joined: list[Event] = []
    for event in sorted(events):
        if event.end_seconds < event.start_seconds:
            raise ValueError(f"event {event.name!r} ends at {event.end_seconds:g} s, before its start")
        before = joined[last[event.name]] if event.name in last else None
        if before and event.start_seconds - before.end_seconds < _GAP_SECONDS:
            end = max(before.end_seconds, event.end_seconds)
            joined[last[event.name]] = before._replace(end_seconds=end)
        else:
            last[event.name] = len(joined)
            joined.append(event)
    return joined


def _runs(events: Sequence[Event]) -> list[Run]:
    runs: list[Run] = []
    for start, end, name in events:
        if runs and runs[-1].name == name:
            runs[-1] = Run(runs[-1].start_seconds, end, name, runs[-1].times + 1)
        else:
            runs.append(Run(start, end, name, 1))
    return runs


def _phrase(run: Run, duration_seconds: float) -> str:
    name = run.name.lower() if run.times == 1 else f"{run.name.lower()} {run.times} times"
    if run.times == 1 and run.end_seconds - run.start_seconds >= _THROUGHOUT_SHARE * duration_seconds:
        return f"{name} throughout"
    return f"{name} {run.start_seconds:.1f}-{run.end_seconds:.1f} s"
