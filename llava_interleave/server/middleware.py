"""What stands before every route: who may ask, how often, and how much is read of a request. Knows no model."""

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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import OptionError
from .api_errors import ApiError, ClientDisconnected, forget, response, to_api_error
from .metrics import Metrics
from .settings import MB, Settings

SCRIPTS = ("app.js", "api.js", "dom.js", "leaned.js", "store.js", "markdown.js")
PAGE = {"/": "index.html"} | {f"/{name}": name for name in ("style.css", *SCRIPTS)}
"""The files of the page by path; they hold nothing of anybody."""
DOCS = "/docs"
"""The API in words; it is the same for everybody."""
OPEN = ("/health", DOCS, *PAGE)
"""Paths that need no key. Whatever else is added is closed."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
BODIES = 4
"""So many bodies of the largest size are held at a time."""
JSON_VALUES = 250_000
"""Values of a JSON body: each takes far more memory read than written."""
SHORTEST_KEY = 16


class ApiKeys:
    """API keys. Only their hashes are kept; a key's name, in the log and as the salt of its caches, is a part of its hash."""

    def __init__(self, keys: list[str]) -> None:
        for key in keys:
            if len(key) < SHORTEST_KEY or not key.isascii():
                raise OptionError(
                    f"an API key has {len(key)} characters; it takes at least {SHORTEST_KEY}, of plain ASCII"
                )
        if not keys:
            raise OptionError(
                "the file of API keys has none: write one a line, for example the output of `openssl rand -hex 24`"
            )
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """One key a line; empty lines and those that start with # do not count."""
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise OptionError(f"the API keys in {path} cannot be read: {error}") from error
        return cls([line for line in lines if line and not line.startswith("#")])

    def name(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header, None for a wrong one; takes as long for any."""
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = [known for known in self._hashes if hmac.compare_digest(known, given)]
        return found[0].hex()[:16] if found and scheme.lower() == "bearer" else None


class RateLimit:
    """So many requests a minute: a bucket that fills evenly, one for each key."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str, now: float) -> None:
        """Raises Refusal when the bucket is empty."""
        left, since = self._buckets.get(key, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        if left < 1:
            wait = 1 + int((1 - left) * 60 / self.per_minute)
            message = f"more than {self.per_minute} requests a minute; try again in {wait} s"
            raise ApiError(429, "rate_limit_exceeded", message, retry=wait)
        self._buckets[key] = (left - 1, now)


class GuardMiddleware:
    """ASGI middleware, outermost: nothing reaches a route, and no exception a client, but through it."""

    def __init__(
        self, app: ASGIApp, settings: Settings, keys: ApiKeys | None, metrics: Metrics
    ) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.rate = RateLimit(settings.requests_per_minute)
        self.held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(self.settings.request_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnected from None

        held = _Body()
        try:
            scope.setdefault("state", {})["key"] = self.admit(scope)
            await self._read(held, Headers(scope=scope), receive)
            await self.app(scope, held.replay(receive), watched)
        except ClientDisconnected as gone:
            forget(gone)
        except Exception as error:  # noqa: BLE001  the outermost place; with the status sent, all that is left is to break off
            refusal = self.metrics.refused(to_api_error(error))
            if not status:
                with contextlib.suppress(ClientDisconnected):
                    await response(refusal)(scope, receive, watched)
        finally:
            self.held -= held.size
            self.metrics.answered(scope, status)

    def admit(self, scope: MutableMapping[str, Any]) -> str:
        """The name of the key that asks, "" where none is asked for. Raises Refusal."""
        if scope["path"] in OPEN:
            return ""
        headers, key = Headers(scope=scope), ""
        if self.keys is None:
            self._same_machine(headers)
        elif (found := self.keys.name(headers.get("authorization", ""))) is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "this server needs an API key: send the header 'Authorization: Bearer <key>'",
            )
        else:
            key = found
        self.rate.take(key, time.monotonic())
        return key

    def _same_machine(self, headers: Headers) -> None:
        """Without keys: only programs of this machine and pages that it served itself, not whatever a browser has open."""
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in LOOPBACK and host not in LOOPBACK:
            raise ApiError(
                403,
                "wrong_host",
                "without --api-keys this server answers to localhost, 127.0.0.1 and [::1] only",
            )
        if "origin" in headers and headers["origin"] not in (f"http://{host}", f"https://{host}"):
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

    async def _read(self, held: _Body, headers: Headers, receive: Receive) -> None:
        most = self.settings.max_body_mb * MB
        too_much = ApiError(
            413,
            "request_too_large",
            f"the request has more than the limit of {self.settings.max_body_mb} MB",
        )
        if (promised := headers.get("content-length", "0")).isdigit() and int(promised) > most:
            raise too_much
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                while not held.complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    self.held += held.add(message)
                    if held.size > most:
                        raise too_much
                    if self.held > BODIES * most:
                        raise ApiError(
                            503,
                            "overloaded",
                            "the server is reading too many large requests; try again",
                            retry=2,
                        )
        except TimeoutError:
            seconds = f"{self.settings.request_timeout:g} s"
            raise ApiError(
                408,
                "request_timeout",
                f"the request took longer than the limit of {seconds} to arrive",
            ) from None
        upload = headers.get("content-type", "").lower().startswith("multipart/")
        if not upload and (values := held.values) > JSON_VALUES:
            told = f"the JSON has {values:,} commas and brackets, more than the limit of {JSON_VALUES:,}"
            raise ApiError(413, "request_too_large", told)


class _Body:
    """The body of one request, read before anything looks at it."""

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
        """What the application receives: the body, and after it whatever the client does next."""

        async def again() -> Message:
            if self.chunks:
                return {
                    "type": "http.request",
                    "body": self.chunks.pop(0),
                    "more_body": bool(self.chunks),
                }
            return await receive()

        return again
