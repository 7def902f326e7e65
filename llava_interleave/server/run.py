"""uvicorn with a timeout for idle connections and a graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import typing
import warnings
from collections import Counter

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import OptionError
from .api_errors import log
from .api_keys import ApiKeys
from .live import LiveSessions
from .settings import Settings
from .uploads import Files

if typing.TYPE_CHECKING:
    from .tracing import Tracing

HEADER_TIMEOUT = 10.0
"""Seconds for a client to send the header of its next request."""
READ_SIZE, BODY_READ_SIZE = 16_384, 262_144
"""Bytes read from a connection at a time by asyncio: they are parsed before another one's turn.
More of a body of known length, which is not parsed: each read costs a tenth of a millisecond."""
MIN_CHUNK, SMALL_CHUNKS = 16, 1000
"""Fewest bytes for each chunk of a body on average, after so many."""
LISTEN_FDS_START = 3
"""The first file descriptor that systemd passes (sd_listen_fds)."""
KEEP_ALIVE = 5
"""Seconds that a connection may be idle between two requests."""
FLUSH_TIMEOUT = 5
"""Seconds after `shutdown_timeout` for clients to read their last event."""


def log_to_stderr(level: int) -> None:
    """Log this package from `level` on, and warnings of other packages, to stderr.

    But not Pillow's of damaged files: one file can make tens of thousands; nor uvicorn's.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("llava_interleave").setLevel(level)
    # It warns of each request that is no HTTP: anyone could fill the log with them.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    access = logging.getLogger("llava_interleave.access")
    access.setLevel(logging.INFO)  # whatever the level of the rest: --access-log turns it off
    if not access.handlers:
        access.addHandler(_StderrHandler())
        access.propagate = False


class _StderrHandler(logging.StreamHandler[typing.TextIO]):
    """Writes to what `sys.stderr` is by then: it may have been replaced, and the old one closed."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class Protocol(H11Protocol):
    """Closes connections whose next header is late; uvicorn has no timeout for it.

    At the limit of connections a new one takes the place of the one that has waited longest, among
    those of the address that has most waiting: half-open connections never keep others out.
    """

    header_timeout = HEADER_TIMEOUT
    max_connections = 256
    waiting: dict[Protocol, str]
    """Connections without a request, oldest first, with their addresses; of one server."""
    _timer: asyncio.TimerHandle | None = None
    _bytes = _lines = 0  # of the body so far

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_at_most(READ_SIZE)
        self._wait()
        if len(self.connections) > self.max_connections:
            addresses = Counter(self.waiting.values())
            address = addresses.most_common(1)[0][0]
            oldest = next(one for one, peer in self.waiting.items() if peer == address)
            oldest._stop_waiting()
            self.connections.discard(oldest)
            oldest.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._has_tiny_chunks(data):
            self.transport.close()
            return
        super().data_received(data)
        if self._in_request:
            self._stop_waiting()
        elif self._timer is None:
            self._wait()
        self._read_at_most(BODY_READ_SIZE if self._in_sized_body else READ_SIZE)

    def _read_at_most(self, size: int) -> None:
        if hasattr(self.transport, "max_size"):  # asyncio's; uvloop's has none
            self.transport.max_size = size

    @property
    def _in_sized_body(self) -> bool:
        return (
            self._in_request
            and self.conn.their_state is h11.SEND_BODY
            and (b"transfer-encoding", b"chunked") not in self.headers
        )

    @property
    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _has_tiny_chunks(self, data: bytes) -> bool:
        if self._in_request:
            chunked, body = (b"transfer-encoding", b"chunked") in self.headers, data
        else:
            head, _, body = data.partition(b"\r\n\r\n")
            chunked, self._bytes, self._lines = b"chunked" in head.lower(), 0, 0
        if not chunked:
            return False
        self._bytes, self._lines = self._bytes + len(body), self._lines + body.count(b"\r\n")
        return self._lines > SMALL_CHUNKS and self._bytes < MIN_CHUNK * self._lines

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._timer is None and not self.transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        self.waiting[self] = self.client[0] if self.client else ""
        self._timer = self.loop.call_later(self.header_timeout, self._on_timeout)

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def check_port(settings: Settings) -> None:
    """Raises OptionError where the server cannot listen: before a model is loaded."""
    if inherited_socket(settings) is not None:
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]
        raise OptionError(
            f"cannot listen on {settings.host}, port {settings.port}: {why}; --port names another"
        ) from error


def inherited_socket(settings: Settings) -> socket.socket | None:
    """The socket that systemd, or a process before this one, passes on (LISTEN_FDS=1).

    Connections wait in it while a server restarts, and two servers may take them in turn: none is
    lost. Raises OptionError for one that needs API keys.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    inherited = socket.socket(fileno=os.dup(LISTEN_FDS_START))
    host = str(inherited.getsockname()[0])
    dataclasses.replace(settings, host=host)  # checked as a --host
    return inherited


class Drainable(typing.Protocol):
    """State of an application that can shut down gracefully."""

    name: str
    files: Files
    live: LiveSessions | None

    def drain(self) -> None:
        """Refuse new requests; running ones get `shutdown_timeout` seconds."""


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        limits = {
            "header_timeout": min(HEADER_TIMEOUT, settings.request_timeout),
            "max_connections": settings.max_connections,
            "waiting": {},
        }
        protocol = type("Protocol", (Protocol,), limits)
        self.settings = settings
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
                proxy_headers=True,  # for the address; without keys a proxied request is refused
                forwarded_allow_ips=settings.forwarded_allow_ips,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + FLUSH_TIMEOUT,
            )
        )
        self.service: Drainable = app.state.service
        self.keys: ApiKeys | None = app.state.keys
        self.tracing: Tracing | None = app.state.tracing

    @property
    def address(self) -> str:
        """The URL it listens on, once `started`."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGINT or SIGTERM."""
        inherited = inherited_socket(self.settings)
        super().run(sockets if inherited is None else [inherited])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"serving {self.service.name} at {self.address}/v1", flush=True)
            print(f"the web UI is at {self.address}/", flush=True)
        if self.keys is not None and sys.platform != "win32":
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, self.reload_keys)

    def reload_keys(self) -> None:
        """Read the API keys again. A faulty file changes nothing; removed clients lose uploads."""
        assert self.keys is not None
        try:
            self.keys.reload()
        except OptionError as error:
            log.error("the API keys stay what they were: %s: %s", self.keys.path, error)
            return
        self.service.files.retain(self.keys.names)
        if self.service.live is not None:
            self.service.live.retain(self.keys.names)
        log.info("%d clients have API keys now", len(self.keys.names))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.drain()
        await super().shutdown(sockets)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
