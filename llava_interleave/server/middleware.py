"""Authentication, rate limit and body limits, before every route. Knows no model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access_log import AccessLog, RequestRecord, begin_record
from .api_errors import (
    ApiError,
    ClientDisconnected,
    clear_traceback,
    error_response,
    to_api_error,
)
from .api_keys import ApiKeys, Client
from .fairness import RateLimit, Shares
from .metrics import Metrics
from .settings import MB, Settings
from .web_files import WEB_FILES

if TYPE_CHECKING:
    from .tracing import Tracing

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
REFUSAL_DELAY, MAX_DELAYED = 0.5, 32
"""Seconds that a 429 waits, and how many may wait at a time: a client that sends again at once
would otherwise keep the event loop busy with refusals."""
MAX_ERRORS = 60
"""4xx responses to an API key in a minute; of more, each waits as a 429 does, if there are several
keys: what cannot be answered must not take the time of those who ask what can be.
"""
MAX_FAILED_LOGINS = 120
"""Requests with a wrong API key, or none, of one address in a minute; more get 429."""


class GuardMiddleware:
    """The outermost ASGI middleware: authentication, limits, every exception as a response."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keys: ApiKeys | None,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.access_log, self.tracing = AccessLog(settings.access_log), tracing
        self.rate = RateLimit(settings.requests_per_minute)
        self.failed_logins = RateLimit(MAX_FAILED_LOGINS, "requests without a valid API key")
        self.errors = RateLimit(MAX_ERRORS, "errors")
        self.delayed = 0
        self.max_body = settings.max_body_mb * MB
        self.bodies = Shares(MAX_BODIES * self.max_body, self._one_client)
        self.open_requests = Shares(settings.max_connections, self._one_client)

    def _one_client(self) -> bool:
        return self.keys is None or len(self.keys.names) == 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        scope, status = _normalized(scope), 0
        state = scope.setdefault("state", {})
        record = state.setdefault("record", RequestRecord.of(scope))
        begin_record(record)
        cors = self._cors(Headers(scope=scope))
        extra = [*cors, (b"x-request-id", record.request_id.encode())]

        async def send_in_time(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
                await self._slow_down(key, status)
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
            client = self.admit(scope, record)
            key = state["key"] = client.name
            record.weight = client.weight
            if scope["path"] != HEALTH:
                self._check_open_requests(key)
            self.open_requests.add(key, 1)
            admitted = 1
            await self._read(body, key, Headers(scope=scope), receive)
            await self.app(scope, body.replay(receive), send_in_time)
        except ClientDisconnected as gone:
            record.error = "client_disconnected"
            clear_traceback(gone)
        except Exception as error:  # noqa: BLE001  becomes a response, or ends one
            api_error = self.metrics.count_error(to_api_error(error))
            if not status:
                body.chunks.clear()
                with contextlib.suppress(ClientDisconnected):
                    await error_response(api_error)(scope, receive, send_in_time)
        finally:
            self.bodies.add(key, -body.size)
            self.open_requests.add(key, -admitted)
            self.metrics.count_response(scope, status)
            record.body_bytes = body.size
            self._report(record, scope, status)

    async def _slow_down(self, key: str, status: int) -> None:
        """Wait before a response with this status, where its client gets too many like it."""
        many = status == 429
        if key and 400 <= status < 500 and not self._one_client():
            if self.errors.allows(key):
                self.errors.charge(key, time.monotonic(), 1)
            else:
                many = True
        if many and self.delayed < MAX_DELAYED:
            self.delayed += 1
            try:
                await asyncio.sleep(REFUSAL_DELAY)
            finally:
                self.delayed -= 1

    def _report(self, record: RequestRecord, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.access_log.write(record, route, status)
        if self.tracing is not None and not record.throttled:
            self.tracing.export(record, route, status, time.time(), Headers(scope=scope))

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of an allowed origin use the API; also for a preflight."""
        origin = headers.get("origin", "")
        if not origin or not {origin, "*"} & set(self.settings.cors_origin):
            return []
        cors = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "Retry-After, X-Request-Id",
            "Vary": "Origin",
        }
        if "access-control-request-method" in headers:
            cors |= {
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
                "Access-Control-Max-Age": "600",
            }
        return [(name.lower().encode(), value.encode("latin-1")) for name, value in cors.items()]

    def admit(self, scope: Scope, record: RequestRecord) -> Client:
        """The client of the request, "" where no API key is needed. Raises ApiError."""
        if scope["path"] in OPEN_PATHS:
            return Client("")
        headers = Headers(scope=scope)
        if self.keys is None:
            client: Client | None = Client("")
            self._check_local(headers)
        else:
            client = self.keys.client(headers.get("authorization", ""))
        if client is None:
            record.throttled = True  # unless `take` lets it pass
            self.failed_logins.take(record.address, time.monotonic())
            record.throttled = False
            raise ApiError(
                401,
                "invalid_api_key",
                "this server needs an API key: send the header 'Authorization: Bearer <key>'",
            )
        record.key = client.name
        self.rate.take(client.name, time.monotonic())
        return client

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
        media_type = headers.get("content-type", "")
        body.is_upload = media_type.lower().startswith("multipart/")
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
                    if not body.is_upload and body.values > MAX_JSON_VALUES:
                        raise ApiError(
                            413,
                            "request_too_large",
                            f"the JSON has more than the limit of {MAX_JSON_VALUES:,} commas and "
                            "brackets",
                        )
        except TimeoutError:
            seconds = f"{self.settings.request_timeout:g} s"
            raise ApiError(
                408,
                "request_timeout",
                f"the request took longer than the limit of {seconds} to arrive",
            ) from None


def _overloaded(reason: str) -> ApiError:
    return ApiError(503, "overloaded", f"{reason}; try again", retry=2)


def _normalized(scope: Scope) -> Scope:
    """The scope with a path as the routes have it, and HEAD as GET, whose body uvicorn leaves out.

    Clients leave out /v1, have it twice, or end a path with a slash, which a redirect would turn
    into another address behind a proxy.
    """
    path = "/" + scope["path"].strip(
        "/"
    )  # `PRI * HTTP/2.0` and `OPTIONS *` have a path without one
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
    """The body of one request, read before any route sees it.

    values: commas and brackets so far.
    """

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.size, self.values, self.complete, self.is_upload = 0, 0, False, False

    def add(self, message: Message) -> int:
        chunk = message.get("body", b"")
        self.chunks.append(chunk)
        self.size += len(chunk)
        # `in` passes over base64 twenty times as fast as `count`
        self.values += sum(chunk.count(mark) for mark in (b",", b"[", b"{") if mark in chunk)
        self.complete = not message.get("more_body", False)
        return len(chunk)

    def replay(self, receive: Receive) -> Receive:
        """The application's `receive`: the body, then the client's own messages."""

        async def replayed() -> Message:
            if not self.chunks:
                return await receive()
            await asyncio.sleep(0)  # others' turn
            if self.is_upload:  # is parsed piece by piece
                part = self.chunks.popleft()
            else:
                part = b"".join(self.chunks)
                self.chunks.clear()
            return {"type": "http.request", "body": part, "more_body": bool(self.chunks)}

        return replayed
