"""Requests at a steady rate, and pauses that a server asks for, shared by the threads of a process."""

import time
from collections.abc import Callable
from threading import Lock


class RateLimiter:
    """Spaces out requests evenly; `pause` holds back all of them.

    Args:
        per_minute: requests; None for as many as there are.
    """

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if per_minute is not None and per_minute <= 0:
            raise ValueError(f"requests per minute must be positive, got {per_minute}")
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = clock()
        self._lock = Lock()

    def wait(self) -> None:
        """Return when the next request may start."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            self._sleep(start - now)

    def pause(self, seconds: float) -> None:
        """Let no request start in the next `seconds`."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
