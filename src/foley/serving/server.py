"""The process of the server: uvicorn, and what a signal does to it."""

import asyncio
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from foley.core.logs import get_logger
from foley.serving.service import Service

_CLOSE_SECONDS = 5  # for answers that are under way once everything is made
_HEAD_SECONDS = 20.0  # for the head of a request to come
_RECENT_SECONDS = 10.0  # before the signal: whoever asks for a job now and then may not have seen that it is done
_log = get_logger(__name__)


class ImpatientProtocol(H11Protocol):
    """Closes a connection on which no request begins in time, the first or the next, byte by byte or not at all.

    uvicorn looks at those alone that had an answer, and stops with the first byte that comes.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._impatience = self.loop.call_later(_HEAD_SECONDS, self._close_unused)

    def connection_lost(self, exc: Exception | None) -> None:
        self._impatience.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._impatience.cancel()
        self._impatience = self.loop.call_later(_HEAD_SECONDS, self._close_unused)
        super().on_response_complete()

    def _close_unused(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class DrainingServer(uvicorn.Server):
    """At the first SIGTERM or Ctrl-C it refuses what is new, finishes what it has, and ends; at the second at once.

    Sounds of jobs can be fetched meanwhile, which is waited for; not for those that have long been done.

    Args:
        drain_seconds: after which it ends whatever is left.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._since = 0.0
        self._until: float | None = None  # no signal has come

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._until is not None:
            super().handle_exit(sig, frame)
            return
        self._since = time.monotonic() - _RECENT_SECONDS
        self._until = time.monotonic() + self._drain_seconds
        self._service.engine.stop_accepting()

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and (self._service.is_drained(self._since) or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def server_config(
    app: FastAPI, host: str, port: int, access_log: bool = False, max_connections: int | None = None
) -> uvicorn.Config:
    """Of a server whose logs are those of the process; beyond `max_connections` it answers 503."""
    return uvicorn.Config(
        app,
        host,
        port,
        http=ImpatientProtocol,
        access_log=access_log,
        limit_concurrency=max_connections,
        log_config=None,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )


def run(config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
    """Serve until a signal; logs as the rest of the process does."""
    DrainingServer(config, service, drain_seconds).run()
    _log.info("stopped: nothing waits or runs any more" if service.engine.is_idle else "stopped before all was made")
