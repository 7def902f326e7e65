"""The life of a request: admission, preparation in a thread pool, generation in the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from ..attribution.forward import CachedPrompt
from ..chat import BUILTIN, Answer, Chatbot
from ..errors import ContextError, OptionError, PromptError
from ..options import Options
from ..processing import Estimate, Loader, Processor
from ..prompt import Prompt
from ..structured_output.grammar import GrammarCompiler, GrammarMatcher
from .access_log import current_record
from .api_errors import ApiError, ClientDisconnected
from .attribution import attribute_prompt, check_attribution_budget, cite_prompt
from .engine_thread import EngineThread, ServerJob, use_threads
from .fairness import FairThreadPool, RateLimit, Shares
from .messages import has_media
from .metrics import Metrics
from .openai_types import (
    NO_IMAGES,
    AttributionMode,
    AttributionRequest,
    AttributionResponse,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ImageCitation,
    MediaRequest,
    ModelCard,
    ModelRequest,
    Prefill,
    PromptRequest,
    adapter_name,
)
from .settings import MB, Settings
from .uploads import Files

if TYPE_CHECKING:
    from .batches import Batches
    from .live import LiveSessions

T = TypeVar("T")
BATCH_WEIGHT = 0.01
"""Share of the engine of a batch, next to 1 of an API key."""
STUCK_STEP = 120.0
"""Seconds of a step after which the engine counts as stuck."""
GRAMMAR_SECONDS = 15
"""Seconds a minute that the grammars of one API key take, compiling and masks; over it: 429."""


@dataclass(slots=True)
class PreparedRequest:
    """A request of an API key with a job for each prompt. service: of its model. seconds: that
    preparation took. image_tokens: of its prompts.
    """

    service: Service
    key: str
    request: GenerationRequest
    options: Options
    jobs: list[ServerJob]
    created: int
    seconds: float
    image_tokens: int

    @property
    def num_answers(self) -> int:
        return len(self.jobs) * self.options.n


class SharedState:
    """What the models of a server share. is_exclusive: as `Shares`."""

    def __init__(self, settings: Settings, is_exclusive: Callable[[], bool]) -> None:
        self.settings = settings
        self.files, self._loader = Files(settings.files_mb * MB), Loader(settings.limits())
        self.metrics = Metrics()
        self.shares = Shares(settings.max_requests, is_exclusive)
        """Answers being prepared, waiting or running, by API key."""
        self.media_pool = FairThreadPool(settings.media_workers, "media")
        self.text_pool = FairThreadPool(1, "text")
        self.grammar_pool = FairThreadPool(1, "grammar")
        per_minute = settings.tokens_per_minute
        self.token_rate = None if per_minute is None else RateLimit(per_minute, "tokens")
        self.grammar_rate = RateLimit(GRAMMAR_SECONDS, "seconds of response_format")
        # One at a time: each has a prompt's activations in memory.
        self.attribution_pool = ThreadPoolExecutor(1, "attribution")
        self.prefills: dict[str, ServerJob] = {}  # by API key

    async def prepare(self, pool: FairThreadPool, key: str, work: Callable[[], T]) -> T:
        """Run work that may read media. Raises ApiError after `prepare_timeout` seconds."""
        seconds = self.settings.prepare_timeout
        try:
            async with asyncio.timeout(seconds):
                return await pool.run(key, work)
        except TimeoutError:
            text = f"reading the media took more than {seconds:g} s"
            raise ApiError(503, "media_timeout", text, retry=10) from None

    async def preview(self, key: str, name: str, size: int) -> bytes:
        """An upload, an image, as WebP of at most `size` pixels a side; raises as `Loader.image`
        and `Files.get`."""
        data = self.files.get(key, name).data

        def shrunk(image: Image.Image) -> bytes:
            image.thumbnail((size, size))
            file = BytesIO()
            image.save(file, "WEBP", quality=80)
            return file.getvalue()

        return await self.prepare(self.media_pool, key, lambda: self._loader.fitted(data, shrunk))

    def close(self) -> None:
        """Stop all threads."""
        for pool in (self.media_pool, self.text_pool, self.grammar_pool):
            pool.close()
        self.attribution_pool.shutdown(wait=False, cancel_futures=True)


class Service:
    """A model and the state that its requests share.

    state: that of other models, too; it has its own otherwise.
    """

    def __init__(
        self,
        bot: Chatbot,
        settings: Settings,
        is_exclusive: Callable[[], bool] = lambda: True,
        *,
        state: SharedState | None = None,
        name: str | None = None,
    ) -> None:
        self.bot, self.settings = bot, settings
        bot.processor.loader = Loader(settings.limits(bot.model.config))
        self.name = name or settings.name or bot.source.name
        if self.name in bot.adapters:
            raise OptionError(
                f"the model and an adapter are both called {self.name!r}: rename the adapter"
            )
        self.created = int(time.time())
        self.engine_thread = EngineThread(bot)
        self.grammars = GrammarCompiler(bot.processor.tokenizer)
        self.state = state or SharedState(settings, is_exclusive)
        self.files, self.metrics = self.state.files, self.state.metrics
        self.shares, self.prefills = self.state.shares, self.state.prefills
        self.media_pool, self.text_pool = self.state.media_pool, self.state.text_pool
        self.grammar_pool, self.grammar_rate = self.state.grammar_pool, self.state.grammar_rate
        self.token_rate, self.attribution_pool = self.state.token_rate, self.state.attribution_pool
        if state is None:
            self.metrics.watch(lambda: self.engine_thread.load, lambda: self.num_active)
        self.batches: Batches | None = None  # of the event loop
        self.live: LiveSessions | None = None  # of the event loop
        self.stopping = False
        self.shutdown_error: ApiError | None = None

    @contextlib.asynccontextmanager
    async def use(self, _: str | None) -> AsyncIterator[Service]:
        """Itself, as one of several models."""
        yield self

    def start(self) -> None:
        """Start the engine's thread."""
        self.engine_thread.start()

    @property
    def failed(self) -> bool:
        """Whether the engine has failed for good."""
        return self.engine_thread.failed

    def cards(self) -> list[ModelCard]:
        """What /v1/models says of the model and its adapters."""
        return [
            model_card(
                adapter or self.name,
                self.name if adapter else None,
                self.bot.processor,
                self.bot.generation_config,
                self.bot.source,
            )
            for adapter in (None, *self.bot.adapters)
        ]

    @property
    def num_active(self) -> int:
        """Answers being prepared, waiting or running."""
        return self.shares.used

    def unavailable(self) -> ApiError | None:
        """Why a further request is refused now, or None."""
        if self.engine_thread.failed:
            return ApiError(503, "engine_failed", "the engine has failed; restart the server")
        if self.stopping:
            return ApiError(503, "stopping", "the server is shutting down", retry=2)
        if self.engine_thread.step_seconds() > STUCK_STEP:
            return ApiError(503, "engine_stuck", f"the engine is stuck for {STUCK_STEP:g} s")
        longest = self.settings.prepare_timeout + self.settings.media_timeout
        for pool in (self.media_pool, self.text_pool, self.grammar_pool):
            if pool.longest() > longest:
                message = f"all threads for {pool.name} are stuck; restart the server"
                return ApiError(503, f"{pool.name}_stuck", message)
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

    def options(self, request: ModelRequest) -> Options:
        """The options of a request; its `model` selects the adapter.

        Raises ApiError or OptionError.
        """
        adapter = adapter_name(request.model, self.name, self.bot.adapters)
        return request.options(self.settings, self.bot.default_options).but({"adapter": adapter})

    async def run_in_pool(self, key: str, function: Callable[[], T]) -> T:
        """Run blocking work that reads no media in a thread."""
        return await self.text_pool.run(key, function)

    @contextlib.asynccontextmanager
    async def generation(
        self, request: GenerationRequest, key: str, batch: str = ""
    ) -> AsyncIterator[PreparedRequest]:
        """A request in the engine's queue. Leaving the context aborts it and frees its memory.

        batch: the id of its batch: it has the lowest priority and needs no place.
        """
        options = self.options(request)
        record, start = current_record(), time.time()
        record.model = options.adapter or self.name
        record.user = request.safety_identifier or request.user
        raw = request.prompts(self.settings) if isinstance(request, CompletionRequest) else None
        answers = options.n * options.orders * (1 if raw is None else len(raw))
        with contextlib.nullcontext() if batch else self.admission_slot(answers, key):
            matchers = await self._matchers(request, answers, key)
            if raw is not None:
                prompts = await self.run_in_pool(key, lambda: self._raw_prompts(raw))
            else:
                prompts = [await self._prompt(request, options, key)]
            seconds = time.time() - start
            record.spans.append(("media", start, start + seconds))
            self.metrics.preprocess.observe(seconds)
            media = [one for prompt in prompts for one in prompt.media]
            self.metrics.crops.inc(sum(one.layout.crops for one in media))
            if options.max_new_tokens is None:
                left = self.bot.model.config.text.context - max(map(len, prompts))
                limit = min(self.bot.max_new_tokens, self.settings.max_tokens, left)
                options = options.but({"max_new_tokens": max(1, limit)})
            if isinstance(request, ChatRequest) and (request.attribution or request.cite):
                check_attribution_budget(
                    prompts[0],
                    options.n,
                    options.max_new_tokens or 1,
                    request.attribution,
                    request.cite,
                    self.settings.max_attribution_tokens,
                )
            jobs = [
                ServerJob(
                    prompt,
                    options,
                    index=i * options.n,
                    salt=key.encode(),
                    constraints=matchers
                    if raw is None
                    else matchers[i * options.n : (i + 1) * options.n],
                    client=f"batch {key}" if batch else key,
                    weight=BATCH_WEIGHT if batch else record.weight,
                )
                for i, prompt in enumerate(prompts)
            ]
            image_tokens = sum(one.layout.length for one in media)
            submitted = time.time()
            for job in jobs:
                self.engine_thread.submit(job)
            try:
                for job in jobs:
                    await job.queued()
                yield PreparedRequest(
                    self, key, request, options, jobs, int(time.time()), seconds, image_tokens
                )
            except Exception:
                raise
            except BaseException:  # cancelled, or the generator is closed
                self.metrics.aborted.inc()
                raise
            finally:
                for job in jobs:
                    self.engine_thread.abort(job)
                masks = sum(matcher.seconds for matcher in matchers)
                self.grammar_rate.charge(key, time.monotonic(), masks)
                prompt_tokens = sum(map(len, prompts)) * options.orders
                generated = sum(job.generated_tokens for job in jobs)
                if self.token_rate is not None:
                    self.token_rate.charge(key, time.monotonic(), prompt_tokens + generated)
                record.add_tokens(prompt_tokens, generated)
                for job in jobs:
                    record.spans += job.spans(submitted)

    async def _prompt(self, request: GenerationRequest, options: Options, key: str) -> Prompt:
        """The prompt of messages."""
        assert isinstance(request, MediaRequest)
        continued = isinstance(request, ChatRequest) and request.continue_final_message
        return await self._prepare(
            request,
            key,
            lambda turns: self.bot.prompt(turns, options, continue_final_message=continued),
        )

    def _raw_prompts(self, texts: list[str] | list[list[int]]) -> list[Prompt]:
        """Prompts without a chat template. Raises PromptError for `<image>`, which has no image."""
        tokenizer = self.bot.processor.tokenizer
        made = [
            Prompt(tokenizer.encode(text) if isinstance(text, str) else text, ()) for text in texts
        ]
        if any(tokenizer.image_id in prompt.tokens for prompt in made):
            raise PromptError(f"the prompt has <image>: {NO_IMAGES}")
        context = self.bot.model.config.text.context
        if (longest := max(map(len, made))) >= context:  # here, and not in the engine's thread
            raise ContextError(
                f"the prompt has {longest:,} tokens, but the context is {context:,} with the answer"
            )
        return made

    async def _matchers(self, request: GenerationRequest, n: int, key: str) -> list[GrammarMatcher]:
        """The constraints of n answers; compiling them counts for their API key."""
        response_format = request.response_format.model_dump(by_alias=True)
        if response_format["type"] == "text":
            return []
        self.grammar_rate.take(key, time.monotonic(), 0)

        def work() -> tuple[list[GrammarMatcher] | OptionError, float]:
            start = time.monotonic()
            try:
                return self.grammars.compile(response_format, n), time.monotonic() - start
            except OptionError as error:
                return error, time.monotonic() - start

        result, seconds = await self.grammar_pool.run(key, work)
        self.grammar_rate.charge(key, time.monotonic(), seconds)
        if isinstance(result, OptionError):
            raise result
        return result

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
        record = current_record()
        job = ServerJob(
            prompt,
            options,
            salt=key.encode(),
            prefill_only=True,
            client=key,
            weight=record.weight,
        )
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
                        record.add_tokens(usage.prompt)
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
            check_attribution_budget(prompt, 1, len(tokens), mode, False, budget)
            return prompt, tokens

        with self.admission_slot(1, key):
            prompt, tokens = await self._prepare(request, key, work)
            return await self.attribute(prompt, tokens, mode, options.adapter, key.encode())

    async def attribute(
        self,
        prompt: Prompt,
        answer: Sequence[int],
        mode: AttributionMode,
        adapter: str | None,
        salt: bytes,
    ) -> AttributionResponse:
        """Attribution of an answer."""

        def work(check: Callable[[], None], cached: CachedPrompt) -> AttributionResponse:
            return attribute_prompt(self.bot, prompt, answer, mode, check, cached)

        return await self._attribution(prompt, adapter, salt, work)

    async def cite(
        self, prompt: Prompt, answer: Answer, adapter: str | None, salt: bytes
    ) -> list[ImageCitation]:
        """The images that an answer's sentences rest on."""

        def work(check: Callable[[], None], cached: CachedPrompt) -> list[ImageCitation]:
            return cite_prompt(self.bot, prompt, answer, check, cached)

        return await self._attribution(prompt, adapter, salt, work)

    async def _attribution(
        self,
        prompt: Prompt,
        adapter: str | None,
        salt: bytes,
        compute: Callable[[Callable[[], None], CachedPrompt], T],
    ) -> T:
        """Compute in the thread for attribution, with what the engine has cached of the prompt.

        Cancelling it ends the work before the next forward pass.
        """
        cancelled, start = threading.Event(), time.perf_counter()

        def check_cancelled() -> None:
            if self.shutdown_error:
                raise self.shutdown_error
            if cancelled.is_set():
                raise ClientDisconnected

        def cached() -> CachedPrompt:
            future = self.engine_thread.call(
                lambda engine: engine.cached_prompt(prompt, salt=salt, adapter=adapter)
            )
            while True:  # the engine's thread may have ended
                check_cancelled()
                with contextlib.suppress(TimeoutError):
                    return future.result(0.5)

        def work() -> T:
            use_threads(self.bot.model.config)
            with self.bot.engine.adapters.whole(adapter):
                return compute(check_cancelled, cached())

        try:
            result = await asyncio.wrap_future(self.attribution_pool.submit(work))
        finally:
            cancelled.set()
        self.metrics.attribution.observe(time.perf_counter() - start)
        return result

    async def _prepare(
        self, request: MediaRequest, key: str, work: Callable[[list[dict[str, Any]]], T]
    ) -> T:
        turns = request.turns(lambda name: self.files.get(key, name).data, self.settings)
        pool = self.media_pool if has_media(turns) else self.text_pool
        return await self.state.prepare(pool, key, lambda: work(turns))

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

    def close_model(self) -> None:
        """Stop the threads of the model."""
        self.end()
        self.engine_thread.close()
        self.grammars.close()

    def close(self) -> None:
        """Stop all threads."""
        self.close_model()
        self.state.close()


def model_card(
    name: str,
    parent: str | None,
    processor: Processor,
    generation_config: dict[str, Any],
    folder: Path,
) -> ModelCard:
    """What /v1/models says of a model of this folder with this processor."""
    config = processor.config
    return ModelCard(
        id=name,
        parent=parent,
        context_length=config.text.context,
        tokens_per_image=config.image_layout.length,
        max_tokens_per_image=config.max_tokens_per_image,
        tokens_per_frame=config.video_layout(2).length // 2,
        video_frames=processor.num_frames,
        generation_config=generation_config,
        builtin=folder == BUILTIN,
    )


def _overloaded(reason: str) -> ApiError:
    return ApiError(503, "overloaded", f"{reason}; try again", retry=2)
