"""uvicorn with a timeout for idle connections and a graceful shutdown."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
import typing

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

KEEP_ALIVE = 5
"""Seconds that a connection may be idle between two requests."""
FLUSH_TIMEOUT = 5
"""Seconds after `shutdown_timeout` for clients to read their last event."""
M_ARENA_MAX = -8
"""glibc's malloc.h: the maximum number of arenas."""


def use_single_malloc_arena() -> bool:
    """Let all threads share one malloc arena, and return whether the C library can.

    Call it before threads start. glibc gives each thread an arena, and a thread does not use the
    free memory of another's arena: memory grows with traffic. docs/decisions.md has the figures.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False


def log_to_stderr(level: int) -> None:
    """Log this package from `level` on, and warnings of other packages, to stderr."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("llava_interleave").setLevel(level)


class Protocol(H11Protocol):
    """Closes connections whose next header is late; uvicorn has no timeout for it."""

    header_timeout = 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_timeout, self._on_timeout)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        in_request = self.cycle is not None and not self.cycle.response_complete
        if in_request and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif not in_request and self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout, self._on_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _on_timeout(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Drainable(typing.Protocol):
    """State of an application that can shut down gracefully."""

    name: str

    def drain(self) -> None:
        """Refuse new requests; running ones get `shutdown_timeout` seconds."""


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        protocol = type("Protocol", (Protocol,), {"header_timeout": settings.request_timeout})
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=settings.max_connections,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + FLUSH_TIMEOUT,
            )
        )
        self.service: Drainable = app.state.service

    @property
    def address(self) -> str:
        """The URL it listens on, once `started`."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"serving {self.service.name} at {self.address}/v1", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.drain()
        await super().shutdown(sockets)
