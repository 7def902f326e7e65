"""Authentication, rate limit and body limits, before every route. Knows no model."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import OptionError
from .api_errors import (
    ApiError,
    ClientDisconnected,
    clear_traceback,
    error_response,
    to_api_error,
)
from .fairness import RateLimit, Shares
from .metrics import Metrics
from .settings import MB, Settings

WEB = Path(__file__).parent / "web"
WEB_FILES = {"/": "index.html"} | {f"/{path.name}": path.name for path in sorted(WEB.iterdir())}
"""The web UI's static files by path."""
HEALTH = "/health"
OPEN_PATHS = (HEALTH, *WEB_FILES)
"""Paths that need no API key; all others do."""
API = ("batches", "chat", "completions", "embeddings", "files", "messages", "models", "responses")
"""First parts of paths below /v1."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MAX_BODIES = 4
"""Request bodies of the largest size in memory at a time."""
MAX_JSON_VALUES = 250_000
"""Values of a JSON body: a parsed value takes far more memory than its text."""
MIN_KEY_LENGTH = 16


class ApiKeys:
    """Hashes of the API keys.

    A key's name, in the log and as the salt of its caches, is a prefix of its hash.
    """

    def __init__(self, keys: list[str]) -> None:
        for key in keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii():
                raise OptionError(
                    f"an API key has {len(key)} characters; it needs {MIN_KEY_LENGTH} of ASCII"
                )
        if not keys:
            raise OptionError(
                "the file of API keys has none: write one a line, "
                "for example the output of `openssl rand -hex 24`"
            )
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a file with one key a line; empty lines and comments (#) are skipped."""
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot read the API keys in {path}: {error}") from error
        return cls([line for line in lines if line and not line.startswith("#")])

    def __len__(self) -> int:
        return len(self._hashes)

    def name(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header, None if unknown. Constant time."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [known for known in self._hashes if hmac.compare_digest(known, digest)]
        return matches[0].hex()[:16] if matches and scheme.lower() == "bearer" else None


class GuardMiddleware:
    """The outermost ASGI middleware: authentication, limits, every exception as a response."""

    def __init__(
        self, app: ASGIApp, settings: Settings, keys: ApiKeys | None, metrics: Metrics
    ) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.rate = RateLimit(settings.requests_per_minute)
        self.max_body = settings.max_body_mb * MB
        self.bodies = Shares(MAX_BODIES * self.max_body, exclusive=keys is None or len(keys) == 1)
        self.open_requests = Shares(
            settings.max_connections, exclusive=keys is None or len(keys) == 1
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        scope, status = _normalized(scope), 0
        cors = self._cors(Headers(scope=scope))

        async def send_in_time(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *cors]}
            try:
                async with asyncio.timeout(self.settings.request_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnected from None

        body, key, admitted = _Body(), "", 0
        try:
            _check_framing(scope)
            if cors and scope["method"] == "OPTIONS":
                await Response(status_code=204)(scope, receive, send_in_time)
                return None
            key = scope.setdefault("state", {})["key"] = self.admit(scope)
            if scope["path"] != HEALTH:
                self._check_open_requests(key)
            self.open_requests.add(key, 1)
            admitted = 1
            await self._read(body, key, Headers(scope=scope), receive)
            await self.app(scope, body.replay(receive), send_in_time)
        except ClientDisconnected as gone:
            clear_traceback(gone)
        except Exception as error:  # noqa: BLE001  becomes a response, or ends one
            api_error = self.metrics.count_error(to_api_error(error))
            if not status:
                with contextlib.suppress(ClientDisconnected):
                    await error_response(api_error)(scope, receive, send_in_time)
        finally:
            self.bodies.add(key, -body.size)
            self.open_requests.add(key, -admitted)
            self.metrics.count_response(scope, status)

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of an allowed origin use the API; also for a preflight."""
        origin = headers.get("origin", "")
        if not origin or not {origin, "*"} & set(self.settings.cors_origin):
            return []
        cors = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "Retry-After",
            "Vary": "Origin",
        }
        if "access-control-request-method" in headers:
            cors |= {
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
                "Access-Control-Max-Age": "600",
            }
        return [(name.lower().encode(), value.encode("latin-1")) for name, value in cors.items()]

    def admit(self, scope: MutableMapping[str, Any]) -> str:
        """The name of the request's API key, "" where none is needed. Raises ApiError."""
        if scope["path"] in OPEN_PATHS:
            return ""
        headers = Headers(scope=scope)
        if self.keys is None:
            key: str | None = ""
            self._check_local(headers)
        else:
            key = self.keys.name(headers.get("authorization", ""))
        if key is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "this server needs an API key: send the header 'Authorization: Bearer <key>'",
            )
        self.rate.take(key, time.monotonic())
        return key

    def _check_local(self, headers: Headers) -> None:
        """Without API keys: only programs of this machine and the web UI, no other web page."""
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in LOOPBACK and host not in LOOPBACK:
            raise ApiError(
                403,
                "wrong_host",
                "without --api-keys this server answers to localhost, 127.0.0.1 and [::1] only",
            )
        own = (f"http://{host}", f"https://{host}", *self.settings.cors_origin)
        if "origin" in headers and headers["origin"] not in own:
            raise ApiError(
                403,
                "wrong_origin",
                "without --api-keys this server does not answer pages of other origins",
            )
        if "x-forwarded-for" in headers or "forwarded" in headers:
            raise ApiError(
                403,
                "proxied",
                "this request came through a proxy; a server behind one needs --api-keys",
            )

    def _check_open_requests(self, key: str) -> None:
        """Raises ApiError where too many requests are open; /health always has room."""
        if self.open_requests.used >= self.open_requests.total:
            raise _overloaded("too many requests are open")
        if not self.open_requests.fits(key, 1):
            message = f"this API key has {self.open_requests.of(key)} open requests; try again"
            raise ApiError(429, "concurrency_limit_exceeded", message, retry=2)

    async def _read(self, body: _Body, key: str, headers: Headers, receive: Receive) -> None:
        too_large = ApiError(
            413,
            "request_too_large",
            f"the request exceeds the limit of {self.settings.max_body_mb} MB",
        )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                while not body.complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    size = body.add(message)
                    fits = self.bodies.fits(key, size)
                    self.bodies.add(key, size)
                    if body.size > self.max_body:
                        raise too_large
                    if not fits or self.bodies.used > self.bodies.total:
                        raise _overloaded("too many large requests arrive at once")
        except TimeoutError:
            seconds = f"{self.settings.request_timeout:g} s"
            raise ApiError(
                408,
                "request_timeout",
                f"the request took longer than the limit of {seconds} to arrive",
            ) from None
        upload = headers.get("content-type", "").lower().startswith("multipart/")
        if not upload and (values := body.values) > MAX_JSON_VALUES:
            reason = (
                f"the JSON has {values:,} commas and brackets; the limit is {MAX_JSON_VALUES:,}"
            )
            raise ApiError(413, "request_too_large", reason)


def _overloaded(reason: str) -> ApiError:
    return ApiError(503, "overloaded", f"{reason}; try again", retry=2)


def _normalized(scope: Scope) -> Scope:
    """The scope with a path as the routes have it, and HEAD as GET, whose body uvicorn leaves out.

    Clients leave out /v1, have it twice, or end a path with a slash, which a redirect would turn
    into another address behind a proxy.
    """
    path = scope["path"].rstrip("/") or "/"
    if path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    elif path.split("/")[1] in API:
        path = f"/v1{path}"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": path.encode(), "method": method}


def _check_framing(scope: Scope) -> None:
    """Raises ApiError for two lengths of one body: a proxy may choose the other one (smuggling)."""
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        message = "a request may not have both Content-Length and Transfer-Encoding"
        raise ApiError(400, "invalid_request", message, close=True)


class _Body:
    """The body of one request, read before any route sees it."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size, self.complete = 0, False

    def add(self, message: Message) -> int:
        chunk = message.get("body", b"")
        self.chunks.append(chunk)
        self.size += len(chunk)
        self.complete = not message.get("more_body", False)
        return len(chunk)

    @property
    def values(self) -> int:
        return sum(chunk.count(mark) for chunk in self.chunks for mark in (b",", b"[", b"{"))

    def replay(self, receive: Receive) -> Receive:
        """The application's `receive`: the body, then the client's own messages."""

        async def replayed() -> Message:
            if self.chunks:
                return {
                    "type": "http.request",
                    "body": self.chunks.pop(0),
                    "more_body": bool(self.chunks),
                }
            return await receive()

        return replayed
