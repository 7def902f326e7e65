"""The application behind a port: uvicorn, with an end to slow connections and to answers under way."""

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
AFTERWARDS = 5
"""Seconds after `shutdown_timeout` in which clients take what they are told."""


M_ARENA_MAX = -8
"""glibc's malloc.h: how many heaps there may be."""


def one_heap() -> bool:
    """Have this process's threads share one heap, before they have any; -> whether the C library has a switch for that.

    glibc gives threads heaps of their own. What requests of all sizes leave free in one no other can use, so that memory
    grows for as long as there is traffic; docs/decisions.md has the figures.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False


def log_to_stderr(level: int) -> None:
    """This package's log from a level on, of others what is a warning."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("llava_interleave").setLevel(level)


class Protocol(H11Protocol):
    """Closes connections whose next request does not begin in time: uvicorn itself waits for a slow header for ever."""

    seconds = 30.0
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self.loop.call_later(self.seconds, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        asking = self.cycle is not None and not self.cycle.response_complete
        if asking and self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        elif not asking and self._waiting is None:
            self._waiting = self.loop.call_later(self.seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def _late(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Served(typing.Protocol):
    """What answers behind a port."""

    name: str

    def drain(self) -> None:
        """Take nothing more, and let what is under way end within `shutdown_timeout`."""


class Server(uvicorn.Server):
    """A server that lets answers under way end before it goes."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        protocol = type("Protocol", (Protocol,), {"seconds": settings.request_timeout})
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
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + AFTERWARDS,
            )
        )
        self.service: Served = app.state.service

    @property
    def address(self) -> str:
        """Where it listens, once it has `started`."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"serving {self.service.name} at {self.address}/v1", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.drain()
        await super().shutdown(sockets)
