"""The life of a request: admission, preparation in a thread pool, generation in the engine's."""

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
from ..options import Options
from ..processing import Estimate, Loader
from ..prompt import Prompt
from ..structured_output.grammar import GrammarCompiler
from .api_errors import ApiError, ClientDisconnected, log
from .attribution import attribute_prompt, check_attribution_budget
from .engine_thread import EngineThread, ServerJob
from .fairness import FairThreadPool, RateLimit, Shares
from .messages import has_media
from .metrics import Metrics
from .openai_types import (
    AttributionMode,
    AttributionRequest,
    AttributionResponse,
    ChatRequest,
    Prefill,
    PromptRequest,
    adapter_name,
)
from .settings import MB, Settings
from .uploads import Files

T = TypeVar("T")
STUCK_STEP = 120.0
"""Seconds of a step after which the engine counts as stuck."""


@dataclass(slots=True)
class PreparedRequest:
    """A request with its prompt. seconds: that preparation took. image_tokens: of its prompt."""

    request: ChatRequest
    job: ServerJob
    created: int
    seconds: float
    image_tokens: int


class Service:
    """A model and the state that its requests share."""

    def __init__(self, bot: Chatbot, settings: Settings, *, several_keys: bool) -> None:
        self.bot, self.settings = bot, settings
        bot.processor.loader = Loader(settings.limits(bot.model.config))
        self.name = settings.name or bot.source.name
        if self.name in bot.adapters:
            raise OptionError(
                f"the model and an adapter are both called {self.name!r}: rename the adapter"
            )
        self.created = int(time.time())
        self.engine_thread = EngineThread(bot)
        self.grammars = GrammarCompiler(bot.processor.tokenizer)
        self.files = Files(settings.files_mb * MB)
        self.metrics = Metrics()
        self.shares = Shares(settings.max_requests, exclusive=not several_keys)
        """Answers being prepared, waiting or running, by API key."""
        self.metrics.watch(lambda: self.engine_thread.load, lambda: self.num_active)
        self.media_pool = FairThreadPool(settings.media_workers, "media")
        self.text_pool = FairThreadPool(1, "text")
        self.grammar_pool = FairThreadPool(1, "grammar")
        per_minute = settings.tokens_per_minute
        self.token_rate = None if per_minute is None else RateLimit(per_minute, "tokens")
        # One at a time: each has a prompt's activations in memory.
        self.attribution_pool = ThreadPoolExecutor(1, thread_name_prefix="attribution")
        self.prefills: dict[str, ServerJob] = {}  # by API key
        self.stopping = False
        self.shutdown_error: ApiError | None = None

    @property
    def num_active(self) -> int:
        """Answers being prepared, waiting or running."""
        return self.shares.used

    def unavailable(self) -> ApiError | None:
        """Why a further request is refused now, or None."""
        if self.engine_thread.failed:
            return ApiError(503, "engine_failed", "the engine has failed; restart the server")
        if self.stopping:
            return ApiError(503, "stopping", "the server is shutting down", retry=10)
        if self.engine_thread.step_seconds() > STUCK_STEP:
            return ApiError(503, "engine_stuck", f"the engine is stuck for {STUCK_STEP:g} s")
        if self.media_pool.longest() > self.settings.prepare_timeout + self.settings.media_timeout:
            return ApiError(503, "media_stuck", "all media workers are stuck; restart the server")
        if self.num_active >= self.settings.max_requests:
            return _overloaded(f"{self.num_active} answers are running or waiting")
        return None

    @contextlib.contextmanager
    def admission_slot(self, n: int, key: str) -> Iterator[None]:
        """Admission control for n answers. Raises ApiError where they do not fit."""
        if error := self.unavailable():
            raise error
        if self.num_active and self.num_active + n > self.settings.max_requests:
            raise _overloaded(
                f"{self.num_active} answers are running or waiting, {n} more do not fit"
            )
        if n > self.shares.largest:
            raise OptionError(f"n is {n}; an API key has at most {self.shares.largest} answers")
        if not self.shares.fits(key, n):
            raise ApiError(
                429,
                "concurrency_limit_exceeded",
                f"{self.shares.of(key)} answers of this API key are running or waiting, and {n} "
                "more would leave other keys no room; try again",
                retry=2,
            )
        if self.token_rate is not None:
            self.token_rate.take(key, time.monotonic(), 0)
        self.shares.add(key, n)
        try:
            yield
        finally:
            self.shares.add(key, -n)

    def options(self, request: PromptRequest) -> Options:
        """The options of a request; its `model` selects the adapter.

        Raises ApiError or OptionError.
        """
        adapter = adapter_name(request.model, self.name, self.bot.adapters)
        return request.options(self.settings, self.bot.default_options).but({"adapter": adapter})

    async def run_in_pool(self, key: str, function: Callable[[], T]) -> T:
        """Run blocking work that reads no media in a thread."""
        return await self.text_pool.run(key, function)

    @contextlib.asynccontextmanager
    async def generation(self, request: ChatRequest, key: str) -> AsyncIterator[PreparedRequest]:
        """A request in the engine's queue. Leaving the context aborts it and frees its memory."""
        options = self.options(request)
        start = time.perf_counter()
        with self.admission_slot(options.n, key):
            response_format = request.response_format.model_dump(by_alias=True)
            matchers = (
                []
                if response_format["type"] == "text"
                else await self.grammar_pool.run(
                    key, lambda: self.grammars.compile(response_format, options.n)
                )
            )
            prompt = await self._prepare(
                request, key, lambda turns: self.bot.prompt(turns, options)
            )
            seconds = time.perf_counter() - start
            self.metrics.preprocess.observe(seconds)
            self.metrics.crops.inc(sum(media.layout.crops for media in prompt.media))
            if options.max_new_tokens is None:
                left = self.bot.model.config.text.context - len(prompt)
                limit = min(self.bot.max_new_tokens, self.settings.max_tokens, left)
                options = options.but({"max_new_tokens": max(1, limit)})
            if request.attribution:
                check_attribution_budget(
                    prompt,
                    options.n,
                    options.max_new_tokens or 1,
                    request.attribution,
                    self.settings.max_attribution_tokens,
                )
            job = ServerJob(prompt, options, salt=key.encode(), constraints=matchers, client=key)
            image_tokens = sum(media.layout.length for media in prompt.media)
            self.engine_thread.submit(job)
            outcome = "aborted"
            try:
                await job.queued()
                yield PreparedRequest(request, job, int(time.time()), seconds, image_tokens)
                outcome = "finished"
            except Exception:
                outcome = "failed"
                raise
            finally:
                self.engine_thread.abort(job)
                if self.token_rate is not None:
                    tokens = len(prompt) + job.generated_tokens
                    self.token_rate.charge(key, time.monotonic(), tokens)
                if outcome == "aborted":
                    self.metrics.aborted.inc()
                log.info(
                    "%s: key %s, user %r, %d prompt tokens, %d answers, %.2f s",
                    outcome,
                    key or "none",
                    request.safety_identifier or request.user,
                    len(prompt),
                    options.n,
                    time.perf_counter() - start,
                )

    async def count(self, request: PromptRequest, key: str) -> Estimate:
        """Tokens and memory of a prompt; nothing is decoded."""
        options = self.options(request)
        with self.admission_slot(1, key):
            return await self._prepare(
                request, key, lambda turns: self.bot.estimate(turns, options)
            )

    async def prefill(self, request: PromptRequest, key: str) -> Prefill:
        """Compute a prompt into the prefix cache of this key; a newer call ends an older one."""
        options = self.options(request)
        if error := self.unavailable():
            raise error
        prompt = await self._prepare(request, key, lambda turns: self.bot.prompt(turns, options))
        job = ServerJob(prompt, options, salt=key.encode(), prefill_only=True, client=key)
        if older := self.prefills.get(key):
            older.receive(ApiError(409, "superseded", "a newer prefill of this API key runs now"))
        self.prefills[key] = job
        self.engine_thread.submit(job)
        try:
            await job.queued()
            while True:
                for delta in await job.next(self.settings.sse_keepalive):
                    if delta.answer is not None:
                        usage = delta.answer.usage
                        return Prefill(prompt_tokens=usage.prompt, cached_tokens=usage.cached)
        finally:
            self.engine_thread.abort(job)
            if self.prefills.get(key) is job:
                del self.prefills[key]

    async def attribute_answer(self, request: AttributionRequest, key: str) -> AttributionResponse:
        """Attribution of the answer that ends the messages."""
        options, mode = self.options(request), request.attribution

        def work(turns: list[dict[str, Any]]) -> tuple[Prompt, list[int]]:
            *question, answer = turns
            prompt = self.bot.prompt(question, options)
            tokens = self.bot.processor.tokenizer.encode(answer["content"], special=False)
            budget = self.settings.max_attribution_tokens
            check_attribution_budget(prompt, 1, len(tokens), mode, budget)
            return prompt, tokens

        with self.admission_slot(1, key):
            prompt, tokens = await self._prepare(request, key, work)
            return await self.attribute(prompt, tokens, mode, options.adapter)

    async def attribute(
        self, prompt: Prompt, answer: Sequence[int], mode: AttributionMode, adapter: str | None
    ) -> AttributionResponse:
        """Attribution in its own thread.

        Cancelling it ends the work before the next forward pass.
        """
        cancelled, start = threading.Event(), time.perf_counter()

        def check_cancelled() -> None:
            if self.shutdown_error:
                raise self.shutdown_error
            if cancelled.is_set():
                raise ClientDisconnected

        def work() -> AttributionResponse:
            with self.bot.engine.adapters.whole(adapter):
                return attribute_prompt(self.bot, prompt, answer, mode, check_cancelled)

        try:
            result = await asyncio.wrap_future(self.attribution_pool.submit(work))
        finally:
            cancelled.set()
        self.metrics.attribution.observe(time.perf_counter() - start)
        return result

    async def _prepare(
        self, request: PromptRequest, key: str, work: Callable[[list[dict[str, Any]]], T]
    ) -> T:
        turns = request.turns(lambda name: self.files.get(key, name).data, self.settings)
        pool = self.media_pool if has_media(turns) else self.text_pool
        try:
            async with asyncio.timeout(self.settings.prepare_timeout):
                return await pool.run(key, lambda: work(turns))
        except TimeoutError:
            seconds = f"{self.settings.prepare_timeout:g} s"
            raise ApiError(
                503, "media_timeout", f"reading the media took more than {seconds}", retry=10
            ) from None

    def drain(self) -> None:
        """Refuse new requests; running ones get `shutdown_timeout` seconds."""
        self.stopping = True
        asyncio.get_running_loop().call_later(self.settings.shutdown_timeout, self.end)

    def end(self) -> None:
        """End running requests with the error `stopping`."""
        self.shutdown_error = ApiError(
            503, "stopping", "the server was stopped before the answer was complete", retry=10
        )
        self.engine_thread.fail(self.shutdown_error)

    def close(self) -> None:
        """Stop all threads."""
        self.end()
        self.engine_thread.close()
        self.grammars.close()
        for pool in (self.media_pool, self.text_pool, self.grammar_pool):
            pool.close()
        self.attribution_pool.shutdown(wait=False, cancel_futures=True)


def _overloaded(reason: str) -> ApiError:
    return ApiError(503, "overloaded", f"{reason}; try again", retry=2)
