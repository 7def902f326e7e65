"""The way of a request: a place, its prompt made in a pool of threads, the engine's thread, pieces of answers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ..chat import Chatbot
from ..errors import OptionError
from ..options import MAX_NEW_TOKENS, Options
from ..processing import Estimate, Loader
from ..prompt import Prompt
from .api_errors import ApiError, ClientDisconnected, log
from .attribution import How, attribution_json, check_attribution_budget
from .engine_thread import EngineThread, GenerationJob
from .metrics import Metrics
from .requests import ChatRequest, ExplainRequest, PromptRequest, adapter_of
from .settings import MB, Settings
from .structured_output import Grammars
from .uploads import Files

T = TypeVar("T")


@dataclass(slots=True)
class PreparedRequest:
    """A request under way. prepared: seconds that its prompt took. image_tokens: of its prompt."""

    request: ChatRequest
    job: GenerationJob
    created: int
    prepared: float
    image_tokens: int


class Service:
    """A model and everything that requests to it share."""

    def __init__(self, bot: Chatbot, settings: Settings) -> None:
        self.bot, self.settings = bot, settings
        bot.processor.loader = Loader(settings.limits(bot.model.config))  # however it was loaded
        self.name = settings.name or bot.source.name
        if self.name in bot.adapters:
            raise OptionError(
                f"the model and an adapter are both called {self.name!r}: give the adapter another name"
            )
        self.created = int(time.time())
        self.worker = EngineThread(bot)
        self.grammars = Grammars(bot.processor.tokenizer)
        self.files = Files(settings.files_mb * MB)
        self.metrics = Metrics()
        self.metrics.watch(lambda: self.worker.load, lambda: self.under_way)
        self.pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="media")
        self.explainer = ThreadPoolExecutor(
            1, thread_name_prefix="explain"
        )  # one at a time: each holds a prompt's activations
        self.under_way = 0
        self.stopping = False
        self.late: ApiError | None = None  # what is told to whatever is still under way

    @property
    def trouble(self) -> ApiError | None:
        """Why no request is taken now."""
        if self.worker.failed:
            return ApiError(
                503, "engine_failed", "the engine has failed; the server has to be started again"
            )
        if self.stopping:
            return ApiError(503, "stopping", "the server is shutting down", retry=10)
        if self.under_way >= self.settings.max_requests:
            return ApiError(
                503,
                "overloaded",
                f"{self.under_way} answers are under way or waiting; try again",
                retry=2,
            )
        return None

    @contextlib.contextmanager
    def place(self, n: int) -> Iterator[None]:
        """Room for n answers. Raises Refusal where there is none."""
        if self.trouble:
            raise self.trouble
        if self.under_way and self.under_way + n > self.settings.max_requests:
            raise ApiError(
                503,
                "overloaded",
                f"{self.under_way} answers are under way, {n} more do not fit; try again",
                retry=2,
            )
        self.under_way += n
        try:
            yield
        finally:
            self.under_way -= n

    def options(self, question: PromptRequest) -> Options:
        """What a request asks for, its adapter by the name of its model. Raises Refusal or OptionError."""
        return question.options(self.settings).but(
            {"adapter": adapter_of(question.model, self.name, self.bot.adapters)}
        )

    async def aside(self, work: Callable[[], T]) -> T:
        """The result of work that takes time, done in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    @contextlib.asynccontextmanager
    async def answering(self, request: ChatRequest, key: str) -> AsyncIterator[PreparedRequest]:
        """A request in the engine's queue. Leaving ends it, and gives its memory back."""
        options = self.options(request)
        began = time.perf_counter()
        with self.place(options.n):
            form = request.response_format.model_dump(by_alias=True)
            guides = (
                []
                if form["type"] == "text"
                else await self.aside(lambda: self.grammars.guides(form, options.n))
            )
            prompt = await self._prepare(
                request, key, lambda turns: self.bot.prompt(turns, options)
            )
            prepared = time.perf_counter() - began
            self.metrics.prepare.observe(prepared)
            self.metrics.crops.inc(sum(media.layout.crops for media in prompt.media))
            if options.max_new_tokens is None:
                left = self.bot.model.config.text.context - len(prompt)
                options = options.but(
                    {"max_new_tokens": max(1, min(MAX_NEW_TOKENS, self.settings.max_tokens, left))}
                )
            if request.explain:
                most, how = self.settings.explain_tokens, request.explain
                check_attribution_budget(prompt, options.n, options.max_new_tokens or 1, how, most)
            job = GenerationJob(prompt, options, key.encode(), asyncio.get_running_loop(), guides)
            asked = PreparedRequest(
                request,
                job,
                int(time.time()),
                prepared,
                sum(media.layout.length for media in prompt.media),
            )
            self.worker.submit(job)
            outcome = "left"
            try:
                await job.taken()
                yield asked
                outcome = "answered"
            except Exception:
                outcome = "failed"
                raise
            finally:
                self.worker.abort(job)
                if outcome == "left":
                    self.metrics.aborted.inc()
                log.info(
                    "%s: key %s, user %r, %d prompt tokens, %d answers, %.2f s",
                    outcome,
                    key or "none",
                    request.safety_identifier or request.user,
                    len(prompt),
                    options.n,
                    time.perf_counter() - began,
                )

    async def count(self, question: PromptRequest, key: str) -> Estimate:
        """What a question would take, nothing decoded."""
        options = self.options(question)
        with self.place(1):
            return await self._prepare(
                question, key, lambda turns: self.bot.estimate(turns, options)
            )

    async def explaining(self, request: ExplainRequest, key: str) -> dict[str, Any]:
        """Which image the answer that ends the messages leaned on."""
        options = self.options(request)

        def work(turns: list[dict[str, Any]]) -> tuple[Prompt, list[int]]:
            *asked, answer = turns
            prompt = self.bot.prompt(asked, options)
            tokens = self.bot.processor.tokenizer.encode(answer["content"], special=False)
            check_attribution_budget(
                prompt, 1, len(tokens), request.explain, self.settings.explain_tokens
            )
            return prompt, tokens

        with self.place(1):
            return await self.explain(
                *await self._prepare(request, key, work), request.explain, options.adapter
            )

    async def explain(
        self, prompt: Prompt, answer: Sequence[int], how: How, adapter: str | None
    ) -> dict[str, Any]:
        """Which image an answer leaned on, computed beside the engine. Leaving gives it up before its next pass."""
        left, began = threading.Event(), time.perf_counter()

        def wanted() -> None:
            if self.late:
                raise self.late
            if left.is_set():
                raise ClientDisconnected

        def work() -> dict[str, Any]:
            with self.bot.engine.adapters.whole(adapter):
                return attribution_json(self.bot, prompt, answer, how, wanted)

        try:
            told = await asyncio.wrap_future(self.explainer.submit(work))
        finally:
            left.set()
        self.metrics.explain.observe(time.perf_counter() - began)
        return told

    async def _prepare(
        self, question: PromptRequest, key: str, work: Callable[[list[dict[str, Any]]], T]
    ) -> T:
        turns = question.turns(lambda name: self.files.get(key, name).data, self.settings)
        return await self.aside(lambda: work(turns))

    def drain(self) -> None:
        """Take nothing more; what is under way has `shutdown_timeout`, then it is told."""
        self.stopping = True
        asyncio.get_running_loop().call_later(self.settings.shutdown_timeout, self.end)

    def end(self) -> None:
        """Tell whoever is still answered that it was not in time."""
        self.late = ApiError(
            503, "stopping", "the server was stopped before the answer was complete", retry=10
        )
        self.worker.fail(self.late)

    def close(self) -> None:
        """Stop all threads."""
        self.end()
        self.worker.close()
        for pool in (self.pool, self.explainer):
            pool.shutdown(wait=False, cancel_futures=True)
