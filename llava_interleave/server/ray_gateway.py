"""The one process of a cluster that clients talk to: it guards, counts and keeps files; replicas of the model answer.

Which replica, how many there are and what becomes of one that was lost is Ray Serve's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import platform
import re
import socket
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

from ..batch.ray_cluster import connected, slots
from ..errors import OptionError, RemoteError
from .api_errors import ApiError, body, log
from .app import file_routes, refusal_routes
from .chat_completions import SSE, CancelOnDisconnect, server_sent
from .metrics import PROMETHEUS, Metrics, merged
from .middleware import ApiKeys, GuardMiddleware
from .ray_replica import Replica, ReplicaInfo
from .ray_router import SessionAffinityRouter
from .settings import MB, ReplicaSpec, Settings
from .uploads import Files

T = TypeVar("T")
PARTS = (
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
"""Of a request's scope, what a replica is told beside the headers."""
SECRETS = (b"authorization", b"cookie")
"""Headers that a replica is not told."""
SOURCE = re.compile(rb'"(?=data:|https?:|file[-:])|"(?:image|video|path|base64)"\s*:\s*"')
"""Before the text that names an image or a video."""
FILE = re.compile(rb"file-[0-9a-f]{64}")
TAKEN = 30.0
"""Seconds in which a replica has to take a request: there may be none for as long as a machine takes to be replaced."""
TOLD = 5.0
"""Seconds in which replicas tell of themselves."""
STARTS = 3
"""Times that a replica is started before the first success; what keeps a model from loading mostly stays."""
LEAVING = 600
"""Seconds that a replica which is no longer needed has for what it still answers."""


class Gateway:
    """What the routes in front share, and the way to the replicas. `name`: of the model."""

    def __init__(self, handle: Any, settings: Settings) -> None:
        self.handle, self.settings = handle, settings
        self.files = Files(settings.files_mb * MB)
        self.metrics = Metrics()
        self.stopping = False
        self.name: str = handle.broadcast("tell").results(timeout_s=TAKEN)[0].name

    async def aside(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The response of a replica."""
        if self.stopping:
            raise ApiError(503, "stopping", "the server is shutting down", retry=10)
        asked, key = await Request(scope, receive).body(), scope["state"]["key"]
        headers = [(name, value) for name, value in scope["headers"] if name not in SECRETS]
        told = {part: scope[part] for part in PARTS} | {"headers": headers, "state": {"key": key}}
        files = self.files.among(
            key, {name.decode() for name in FILE.findall(asked)} if b'"file-' in asked else ()
        )
        handle = self.handle.options(session_id=session(key, asked), stream=True)

        async def work(scope: Scope, _: Receive, send: Send) -> None:
            await self._pass(handle.answer.remote(told, asked, files), scope, send)

        await CancelOnDisconnect(work)(scope, receive, send)

    async def _pass(self, messages: Any, scope: Scope, send: Send) -> None:
        """A replica's messages on to the client. One that is lost is told, and not asked for again: it may be what kills them."""
        streams = False
        try:
            await _taken(messages)
            async for ready in messages:
                scope["state"]["replica"] = True
                for message in ready:
                    streams = streams or SSE[0] in message.get("headers", ())
                    await send(message)
        except (RayError, RayServeException) as error:
            log.warning("a replica was lost: %s", error)
            lost = ApiError(
                503, "replica_lost", "the machine that was answering was lost; try again", retry=1
            )
            if not streams:
                raise lost from None
            told = server_sent(body(self.metrics.refused(lost)))
            await send({"type": "http.response.body", "body": told, "more_body": False})
        finally:
            messages.cancel()

    async def tell(self) -> list[ReplicaInfo]:
        """What the replicas say of themselves; nothing where one of them is silent."""
        return [one for one in await self._all("tell") if isinstance(one, ReplicaInfo)]

    async def _all(self, method: str) -> list[Any]:
        try:
            return await self.handle.broadcast(method).results_async(
                timeout_s=TOLD, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            return []

    def drain(self) -> None:
        """Take nothing more; what is under way has `shutdown_timeout`, then it is told."""
        self.stopping = True
        asyncio.get_running_loop().call_later(self.settings.shutdown_timeout, self._end)

    def _end(self) -> None:
        self.ending = asyncio.ensure_future(self._all("end"))


async def _taken(messages: Any) -> None:
    try:
        async with asyncio.timeout(TAKEN):
            await anext(messages)
    except TimeoutError:
        raise ApiError(
            503, "overloaded", "no replica of the model takes requests now; try again", retry=10
        ) from None


def session(key: str, asked: bytes) -> str:
    """Requests of one key that name the same image or video first; "" for those that name none."""
    found = SOURCE.search(asked)
    if found is None:
        return ""
    source = asked[found.end() : asked.find(b'"', found.end())]
    return hashlib.sha256(key.encode() + b"\0" + source).hexdigest()


def gateway_app(front: Gateway) -> FastAPI:
    """The front as an ASGI application: all that is not its own goes to the replicas."""
    settings = front.settings
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = front
    keys = None if settings.api_keys is None else ApiKeys.read(settings.api_keys)
    app.add_middleware(GuardMiddleware, settings=settings, keys=keys, metrics=front.metrics)
    refusal_routes(app, front)
    file_routes(app, front)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        replicas = {one.replica: one.metrics for one in await front.tell()}
        return Response(merged(front.metrics.text(), replicas), media_type=PROMETHEUS)

    app.mount("/", front)
    return app


@contextlib.contextmanager
def deployed(
    model: ReplicaSpec,
    settings: Settings,
    *,
    address: str,
    cpus: int,
    replicas: tuple[int, int] | None,
) -> Iterator[FastAPI]:
    """The application in front of replicas on the cluster at `address`, as `offline.cluster.run` names it; they end with it.

    cpus: of each replica; where the cluster has GPUs, one of those as well. replicas: how few and how many; None: from one to
    what fits now. Raises `RemoteError` where they do not start.
    """
    _free(settings)
    with connected(address, "serve") as ray:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        fits = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus)
        everywhere = replace(
            settings, media_root=settings.media_root and settings.media_root.absolute()
        )
        fewest, most = replicas or (1, fits.models)
        enough = max(1, settings.max_requests // 2)
        deployment = serve.deployment(
            Replica,
            ray_actor_options=dict(fits.model),
            autoscaling_config={
                "min_replicas": fewest,
                "max_replicas": most,
                "target_ongoing_requests": enough,
            },
            request_router_config=RequestRouterConfig(
                request_router_class=f"{SessionAffinityRouter.__module__}.{SessionAffinityRouter.__qualname__}",
                request_router_kwargs={"enough": enough},
            ),
            max_ongoing_requests=settings.max_connections,  # never reached: a replica refuses by its own --max-requests
            max_constructor_retry_count=STARTS,
            graceful_shutdown_timeout_s=LEAVING,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.start(proxy_location="Disabled")  # else Ray opens a port of its own, unguarded
        # The same name where this process was killed and started again: what it had left is replaced, and does not stay beside.
        name = f"llava-{platform.node()}-{settings.port or os.getpid()}"
        try:
            yield gateway_app(Gateway(_run(deployment.bind(model, everywhere), name), settings))
        finally:
            serve.delete(name)


def _free(settings: Settings) -> None:
    """A port that is taken is told before models are loaded, and before another server's replicas are taken for ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        raise OptionError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}"
        ) from error


def _run(application: Any, name: str) -> Any:
    try:
        return serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        told = serve.status().applications[name].deployments[Replica.__name__].message
        own = re.search(r"llava_interleave\.errors\.\w+: (.*)", told)
        raise RemoteError(f"the replicas do not start: {own[1] if own else told}") from error
