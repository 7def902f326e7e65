"""A model on a machine of a cluster, with the routes of its server; the process in front guards them and keeps the files."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from ray import serve
from starlette.types import Message

from .. import chat
from .app import application
from .middleware import GuardMiddleware
from .run import log_to_stderr, one_heap
from .service import Service
from .settings import ReplicaSpec, Settings
from .uploads import RequestScopedFiles, Stored


class ReplicaInfo(NamedTuple):
    """What a replica says of itself: where it runs, what its model is called, and its metrics."""

    replica: str
    name: str
    metrics: bytes


class TrustedGuard(GuardMiddleware):
    """The guard of a replica's routes: the one in front has found out who asks, and has counted."""

    def admit(self, scope: MutableMapping[str, Any]) -> str:
        return scope["state"]["key"]


class Replica:
    """A model and its routes; Ray calls these methods for the process in front."""

    def __init__(self, model: ReplicaSpec, settings: Settings) -> None:
        log_to_stderr(model.log_level)
        one_heap()
        bot = chat.load(
            model.name,
            revision=model.revision,
            precision=model.precision,
            device=model.device,
            deterministic=model.deterministic,
            adapters=dict(model.adapters),
        )
        settings = dataclasses.replace(
            settings
        )  # checked again: --media-root has to be a folder on this machine, too
        self.service = Service(bot, settings)
        self.service.files = self.lent = RequestScopedFiles()
        self.app = application(self.service)
        self.app.add_middleware(
            TrustedGuard, settings=settings, keys=None, metrics=self.service.metrics
        )
        self.service.worker.start()

    async def answer(
        self, scope: dict[str, Any], body: bytes, files: Mapping[str, Stored]
    ) -> AsyncIterator[list[Message]]:
        """Nothing, when the request is here; then the messages of the response, as ASGI has them, together what is ready.

        Leaving ends it.
        """
        yield []
        asked, told = asyncio.Queue[Message](), asyncio.Queue[Message | None]()
        asked.put_nowait({"type": "http.request", "body": body, "more_body": False})
        with self.lent.during(scope["state"]["key"], files):
            work = asyncio.ensure_future(self.app(scope, asked.get, told.put))
            work.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while not (work.done() and told.empty()):
                    first = await told.get()
                    yield [
                        message
                        for message in (first, *(told.get_nowait() for _ in range(told.qsize())))
                        if message
                    ]
            finally:
                work.cancel()
                await asyncio.wait((work,))

    def tell(self) -> ReplicaInfo:
        return ReplicaInfo(
            serve.get_replica_context().replica_id.unique_id,
            self.service.name,
            self.service.metrics.text(),
        )

    def end(self) -> None:
        """Tell whoever is still answered that the server stops."""
        self.service.end()

    def check_health(self) -> None:
        """Ray starts another replica where this raises."""
        if self.service.worker.failed:
            raise RuntimeError("the engine has failed for good")

    def __del__(self) -> None:
        self.service.close()
