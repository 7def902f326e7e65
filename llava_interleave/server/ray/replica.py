"""A model on a machine of a cluster, with the server's routes.

The gateway authenticates and has the uploads.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from ray import serve
from starlette.types import Message, Scope

from ... import chat
from ..access_log import RequestRecord
from ..api_keys import Client
from ..app import create_routes
from ..middleware import GuardMiddleware
from ..process import tune_process
from ..run import log_to_stderr
from ..service import Service
from ..settings import ReplicaSpec, Settings
from ..uploads import RequestScopedFiles, Stored

RECORD = "llava.record"
"""Type of the message after the response, for the gateway: `RequestRecord.handled`."""


class ReplicaInfo(NamedTuple):
    """A replica's id, the name of its model, and its metrics."""

    replica: str
    name: str
    metrics: bytes


class TrustedGuard(GuardMiddleware):
    """Middleware of a replica: the gateway has authenticated and counted the request."""

    def admit(self, scope: Scope, record: RequestRecord) -> Client:
        return Client(scope["state"]["key"], scope["state"]["weight"])

    def _report(self, record: RequestRecord, scope: Scope, status: int) -> None:
        """The gateway does."""


class Replica:
    """A model and its routes; the gateway calls these methods through Ray."""

    def __init__(self, model: ReplicaSpec, settings: Settings) -> None:
        log_to_stderr(model.log_level)
        tune_process()
        bot = chat.load(
            model.name,
            revision=model.revision,
            precision=model.precision,
            kv_precision=model.kv_precision,
            gpu_memory=model.gpu_memory,
            device=model.device,
            batch_invariant=model.batch_invariant,
            adapters=dict(model.adapters),
            generation_config=model.generation_config,
        )
        settings = dataclasses.replace(settings)  # validated again: --media-root on this machine
        self.service = Service(bot, settings, lambda: settings.api_keys is None)
        self.service.files = self.files = RequestScopedFiles()
        self.app = create_routes(self.service, with_batches=False)
        self.app.add_middleware(
            TrustedGuard, settings=settings, keys=None, metrics=self.service.metrics
        )
        self.service.engine_thread.start()

    async def answer(
        self, scope: dict[str, Any], body: bytes, files: Mapping[str, Stored]
    ) -> AsyncIterator[list[Message]]:
        """An empty list on acceptance, then the ASGI messages of the response, ready ones together.

        Closing the generator cancels the request.
        """
        yield []
        record = scope["state"]["record"] = RequestRecord.of(scope)
        received, sent = asyncio.Queue[Message](), asyncio.Queue[Message | None]()
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        with self.files.during(scope["state"]["key"], files):
            work = asyncio.ensure_future(self.app(scope, received.get, sent.put))
            work.add_done_callback(lambda _: sent.put_nowait(None))
            try:
                while not (work.done() and sent.empty()):
                    first = await sent.get()
                    yield [
                        message
                        for message in (first, *(sent.get_nowait() for _ in range(sent.qsize())))
                        if message
                    ]
                yield [{"type": RECORD, **record.handled()}]
            finally:
                work.cancel()
                await asyncio.wait((work,))

    def info(self) -> ReplicaInfo:
        return ReplicaInfo(
            serve.get_replica_context().replica_id.unique_id,
            self.service.name,
            self.service.metrics.text(),
        )

    def end(self) -> None:
        """End running requests with the error `stopping`."""
        self.service.end()

    def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        if self.service.engine_thread.failed:
            raise RuntimeError("the engine has failed for good")

    def __del__(self) -> None:
        self.service.close()
