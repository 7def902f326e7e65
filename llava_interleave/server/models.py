"""Several models in one process by name: loaded when a request names one, the idlest unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ..chat import Chatbot
from ..engine import Load
from ..errors import LlavaError
from ..processing import Estimate
from .access_log import current_record
from .api_errors import ApiError, log
from .openai_types import (
    AttributionRequest,
    AttributionResponse,
    GenerationRequest,
    ModelCard,
    Prefill,
    PromptRequest,
    unknown_model,
)
from .process import trim_heap
from .service import PreparedRequest, Service, SharedState
from .settings import Settings

if TYPE_CHECKING:
    from .batches import Batches
    from .live import LiveSessions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to load a model, and what is known of it before. `load` may take minutes."""

    load: Callable[[], Chatbot]
    card: ModelCard


@dataclass(slots=True, eq=False)
class _Loaded:
    service: Service
    users: int = 0
    last_use: float = field(default_factory=time.monotonic)


class ServedModels:
    """The services of several models, with one state: keys, files, rates and threads.

    At most `settings.max_loaded_models` are in memory. A request for another one waits until it is
    loaded, and for that until one of the others has no request; it is never unloaded before. A
    request without a model gets the first.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        settings: Settings,
        is_exclusive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.specs, self.settings = specs, settings
        self.state = SharedState(settings, is_exclusive)
        self.files, self.metrics, self.shares = (
            self.state.files,
            self.state.metrics,
            self.state.shares,
        )
        self.default, *_ = specs
        self.name = ", ".join(specs)
        self.created = int(time.time())
        self.batches: Batches | None = None  # of the event loop
        self.live: LiveSessions | None = None  # of the event loop
        self.stopping = False
        self._loaded: dict[str, _Loaded] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        self._one_load = asyncio.Lock()
        self.metrics.watch(self.load, lambda: self.shares.used)

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory."""
        return list(self._loaded)

    @property
    def failed(self) -> bool:
        """Whether the engine of a model has failed for good."""
        return any(one.service.failed for one in self._loaded.values())

    @property
    def num_active(self) -> int:
        """Answers being prepared, waiting or running."""
        return self.shares.used

    def load(self) -> Load:
        """The load of all engines together."""
        loads = [one.service.engine_thread.load for one in list(self._loaded.values())]
        return Load(*(sum(getattr(load, name) for load in loads) for name in Load.__slots__))

    def cards(self) -> list[ModelCard]:
        """What /v1/models says of each model."""
        return [
            ModelCard(**{**vars(spec.card), "id": name, "loaded": name in self._loaded})
            for name, spec in self.specs.items()
        ]

    def start(self) -> None:
        """Load the first model in the background, so that its first request need not wait."""
        self._loads[self.default] = asyncio.ensure_future(self._load(self.default))

    def unavailable(self) -> ApiError | None:
        """Why a further request is refused now, or None."""
        if self.stopping:
            return ApiError(503, "stopping", "the server is shutting down", retry=10)
        for one in self._loaded.values():
            if error := one.service.unavailable():
                return error
        return None

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Service]:
        """The service of a model, which stays in memory meanwhile. Raises ApiError."""
        name = name or self.default
        if name not in self.specs:
            raise unknown_model(name, *self.specs)
        if self.stopping:
            raise ApiError(503, "stopping", "the server is shutting down", retry=10)
        start = time.time()
        while (one := self._loaded.get(name)) is None:
            task = self._loads.get(name)
            if task is None or task.done():
                task = self._loads[name] = asyncio.ensure_future(self._load(name))
            # Others may wait for it, too: a client that leaves does not end it.
            await asyncio.shield(task)
        if time.time() - start > 0.001:
            current_record().spans.append(("load", start, time.time()))
        one.users += 1
        try:
            yield one.service
        finally:
            one.users -= 1
            one.last_use = time.monotonic()
            async with self._changed:
                self._changed.notify_all()

    async def _load(self, name: str) -> None:
        async with self._one_load:
            await self._make_room(name)
            log.info("loading the model %s", name)
            start = time.monotonic()
            try:
                bot = await asyncio.to_thread(self.specs[name].load)
            except LlavaError as error:
                log.error("the model %s cannot be loaded: %s", name, error)
                message = f"the model {name!r} cannot be loaded; see the server log"
                raise ApiError(503, "model_not_loaded", message) from None
            service = Service(bot, self.settings, state=self.state, name=name)
            service.stopping = self.stopping
            service.start()
            self._loaded[name] = _Loaded(service)
            log.info("loaded the model %s in %.1f s", name, time.monotonic() - start)

    async def _make_room(self, name: str) -> None:
        """Unload the model that has been idle longest, if there are as many as there may be."""
        end = time.monotonic() + self.settings.prepare_timeout
        while len(self._loaded) >= self.settings.max_loaded_models:
            idle = [(one.last_use, key) for key, one in self._loaded.items() if not one.users]
            if idle:
                await self._unload(min(idle)[1])
                continue
            try:
                async with asyncio.timeout(end - time.monotonic()), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                message = (
                    f"the model {name!r} is not loaded, and {', '.join(self._loaded)} have requests"
                )
                raise ApiError(503, "overloaded", f"{message}; try again", retry=10) from None

    async def _unload(self, name: str) -> None:
        service = self._loaded.pop(name).service
        log.info("unloading the model %s", name)
        await asyncio.to_thread(service.close_model)
        del service
        gc.collect()
        trim_heap()

    @contextlib.asynccontextmanager
    async def generation(
        self, request: GenerationRequest, key: str, batch: str = ""
    ) -> AsyncIterator[PreparedRequest]:
        """As `Service.generation`, by the model that the request names."""
        async with (
            self.use(request.model) as service,
            service.generation(request, key, batch) as prepared,
        ):
            yield prepared

    async def count(self, request: PromptRequest, key: str) -> Estimate:
        """As `Service.count`."""
        async with self.use(request.model) as service:
            return await service.count(request, key)

    async def prefill(self, request: PromptRequest, key: str) -> Prefill:
        """As `Service.prefill`."""
        async with self.use(request.model) as service:
            return await service.prefill(request, key)

    async def attribute_answer(self, request: AttributionRequest, key: str) -> AttributionResponse:
        """As `Service.attribute_answer`."""
        async with self.use(request.model) as service:
            return await service.attribute_answer(request, key)

    async def run_in_pool(self, key: str, function: Callable[[], T]) -> T:
        """As `Service.run_in_pool`."""
        return await self.state.text_pool.run(key, function)

    def drain(self) -> None:
        """As `Service.drain`."""
        self.stopping = True
        for one in self._loaded.values():
            one.service.drain()

    def close(self) -> None:
        """Stop all threads."""
        self.stopping = True
        for task in self._loads.values():
            task.cancel()
        for one in self._loaded.values():
            one.service.close_model()
        self.state.close()
