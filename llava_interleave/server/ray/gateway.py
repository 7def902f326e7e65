"""The process that a cluster's clients talk to: authentication, limits, metrics, uploads.

Ray Serve routes requests, scales the replicas and replaces lost ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...batch.ray_cluster import connected, slots
from ...errors import RemoteError
from ..answer_stream import SSE_HEADERS, CancelOnDisconnect, sse_event
from ..api_errors import ApiError, error_body, log
from ..api_keys import ApiKeys
from ..app import add_error_handlers, add_file_routes, add_guard
from ..batches import Batches
from ..live import LiveSessions
from ..metrics import PROMETHEUS, Metrics, merge_metrics
from ..run import check_port
from ..settings import MB, ReplicaSpec, Settings
from ..uploads import Files
from .replica import RECORD, Replica, ReplicaInfo
from .router import SessionAffinityRouter

T = TypeVar("T")
SCOPE_FIELDS = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "client",
    "server",
)
"""Fields of the ASGI scope that a replica gets, in addition to the headers."""
SECRET_HEADERS = (b"authorization", b"cookie")
"""Headers that a replica does not get."""
MEDIA_SOURCE = re.compile(rb'"(?=data:|https?:|file[-:])|"(?:image|video|path|base64)"\s*:\s*"')
"""Comes before the string that names an image or a video."""
FILE_ID = re.compile(rb"file-[0-9a-f]{64}")
ACCEPT_TIMEOUT = 30.0
"""Seconds for a replica to accept a request; while a machine is replaced there may be none."""
BROADCAST_TIMEOUT = 5.0
"""Seconds for replicas to answer a broadcast."""
MAX_START_ATTEMPTS = 3
"""Attempts to start a replica before the deployment fails: a load error rarely goes away."""
REPLICA_SHUTDOWN_TIMEOUT = 600
"""Seconds for a replica that scales down to finish its requests."""


class Gateway:
    """State of the gateway's routes, and the handle of the replicas. name: of the model."""

    def __init__(self, handle: Any, settings: Settings) -> None:
        self.handle, self.settings = handle, settings
        self.files = Files(settings.files_mb * MB)
        self.metrics = Metrics()
        self.batches: Batches | None = None
        self.live: LiveSessions | None = None
        self.stopping = False
        self.name: str = handle.broadcast("info").results(timeout_s=ACCEPT_TIMEOUT)[0].name

    async def run_in_pool(self, key: str, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to a replica."""
        if self.stopping:
            raise ApiError(503, "stopping", "the server is shutting down", retry=10)
        content, key = await Request(scope, receive).body(), scope["state"]["key"]
        headers = [(name, value) for name, value in scope["headers"] if name not in SECRET_HEADERS]
        forwarded = {part: scope[part] for part in SCOPE_FIELDS} | {
            "headers": headers,
            "state": {"key": key, "weight": scope["state"]["record"].weight},
        }
        files = self.files.existing(
            key,
            {name.decode() for name in FILE_ID.findall(content)} if b'"file-' in content else (),
        )
        handle = self.handle.options(session_id=session_id(key, content), stream=True)

        async def work(scope: Scope, _: Receive, send: Send) -> None:
            await self._pass(handle.answer.remote(forwarded, content, files), scope, send)

        await CancelOnDisconnect(work)(scope, receive, send)

    async def _pass(self, messages: Any, scope: Scope, send: Send) -> None:
        """Pass a replica's ASGI messages on. A lost request is not retried: it may be the cause."""
        streaming = False
        try:
            await _accepted(messages)
            async for ready in messages:
                scope["state"]["replica"] = True
                for message in ready:
                    if message["type"] == RECORD:
                        scope["state"]["record"].update(message)
                        continue
                    streaming = streaming or SSE_HEADERS[0] in message.get("headers", ())
                    await send(message)
        except (RayError, RayServeException) as error:
            log.warning("a replica was lost: %s", error)
            lost = ApiError(
                503, "replica_lost", "the replica that was answering was lost; try again", retry=1
            )
            if not streaming:
                raise lost from None
            event = sse_event(error_body(self.metrics.count_error(lost)))
            await send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            messages.cancel()

    async def replica_infos(self) -> list[ReplicaInfo]:
        """Information of all replicas; empty where one does not answer."""
        return [one for one in await self._broadcast("info") if isinstance(one, ReplicaInfo)]

    async def _broadcast(self, method: str) -> list[Any]:
        try:
            return await self.handle.broadcast(method).results_async(
                timeout_s=BROADCAST_TIMEOUT, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            return []

    def drain(self) -> None:
        """Refuse new requests; running ones get `shutdown_timeout` seconds."""
        self.stopping = True
        asyncio.get_running_loop().call_later(self.settings.shutdown_timeout, self._end)

    def _end(self) -> None:
        self.ending = asyncio.ensure_future(self._broadcast("end"))


async def _accepted(messages: Any) -> None:
    try:
        async with asyncio.timeout(ACCEPT_TIMEOUT):
            await anext(messages)
    except TimeoutError:
        raise ApiError(
            503, "overloaded", "no replica of the model takes requests now; try again", retry=10
        ) from None


def session_id(key: str, content: bytes) -> str:
    """The session of a request: its key and its first image or video; "" without media."""
    match = MEDIA_SOURCE.search(content)
    if match is None:
        return ""
    source = content[match.end() : content.find(b'"', match.end())]
    return hashlib.sha256(key.encode() + b"\0" + source).hexdigest()


def create_gateway_app(gateway: Gateway) -> FastAPI:
    """The gateway as an ASGI application: routes that it does not have go to the replicas."""
    settings = gateway.settings
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = gateway
    keys = None if settings.api_keys is None else ApiKeys.read(settings.api_keys)
    add_guard(app, settings, keys, gateway.metrics)
    add_error_handlers(app, gateway)
    add_file_routes(app, gateway)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        replicas = {one.replica: one.metrics for one in await gateway.replica_infos()}
        return Response(merge_metrics(gateway.metrics.text(), replicas), media_type=PROMETHEUS)

    app.mount("/", gateway)
    return app


@contextlib.contextmanager
def deploy(
    model: ReplicaSpec,
    settings: Settings,
    *,
    address: str,
    cpus: int,
    replicas: tuple[int, int] | None,
) -> Iterator[FastAPI]:
    """Start replicas on the cluster at `address`, yield the gateway, and stop them in the end.

    cpus: of each replica, which also gets one GPU where the cluster has GPUs. replicas: fewest and
    most; None: from one to as many as fit now. Raises `RemoteError` where they do not start.
    """
    check_port(settings)
    with connected(address, "serve") as ray:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        plan = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus)
        replica_settings = replace(
            settings, media_root=settings.media_root and settings.media_root.absolute()
        )
        fewest, most = replicas or (1, plan.replicas)
        router = SessionAffinityRouter
        target = max(1, settings.max_requests // 2)
        deployment = serve.deployment(
            Replica,
            ray_actor_options=dict(plan.resources),
            autoscaling_config={
                "min_replicas": fewest,
                "max_replicas": most,
                "target_ongoing_requests": target,
            },
            request_router_config=RequestRouterConfig(
                request_router_class=f"{router.__module__}.{router.__qualname__}",
                request_router_kwargs={"target": target},
            ),
            max_ongoing_requests=settings.max_connections,  # a replica's --max-requests comes first
            max_constructor_retry_count=MAX_START_ATTEMPTS,
            graceful_shutdown_timeout_s=REPLICA_SHUTDOWN_TIMEOUT,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.start(proxy_location="Disabled")  # or Ray opens a port without authentication
        # The same name after a restart: a deployment that a killed process left behind is replaced.
        name = f"llava-{platform.node()}-{settings.port or os.getpid()}"
        try:
            yield create_gateway_app(
                Gateway(_run(deployment.bind(model, replica_settings), name), settings)
            )
        finally:
            serve.delete(name)


def _run(application: Any, name: str) -> Any:
    try:
        return serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        message = serve.status().applications[name].deployments[Replica.__name__].message
        reason = re.search(r"llava_interleave\.errors\.\w+: (.*)", message)
        raise RemoteError(
            f"the replicas do not start: {reason[1] if reason else message}"
        ) from error
