"""The thread that owns the engine. The event loop submits jobs and receives their deltas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

import torch

from ..chat import AnswerDelta, Chatbot
from ..chat.engine_driver import MAX_PREFILL_DELAY, EngineDriver, GenerationJob
from ..config import LlavaConfig
from ..engine import Engine, Load, Timings
from ..errors import OptionError
from ..structured_output.grammar import GrammarMatcher

log = logging.getLogger("llava_interleave.server")
T = TypeVar("T")
MAX_FAULTS = 3
"""Consecutive failed steps after which the engine counts as failed."""
THREADS = torch.get_num_threads()
MAX_SINGLE_THREAD_PARAMETERS = 20_000_000
"""A network of at most so many parameters runs in one thread. Its layers take microseconds each,
and threads meet after each of them: if another one has the second core, all wait for its turn."""


def use_threads(config: LlavaConfig) -> None:
    """Set how many threads compute for the calling one with a network of this size."""
    small = config.num_parameters <= MAX_SINGLE_THREAD_PARAMETERS
    torch.set_num_threads(1 if small else THREADS)


@dataclass(slots=True, eq=False)
class ServerJob(GenerationJob):
    """A job that the event loop creates and reads, and the engine's thread runs."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _queued: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _deltas: dict[int, AnswerDelta] = field(default_factory=dict)  # by answer, merged until read
    _rejected: Exception | None = None
    _error: Exception | None = None
    _finished_tokens: int = 0
    _timings: Timings | None = None

    def progress(self) -> tuple[int, int, int, bool]:
        """Of its first answer: prompt tokens from the prefix cache, tokens prefilled so far, images
        and videos among them; whether it has started.
        """
        for request in list(self.running):
            kv = request.kv
            processed = min(kv.length if kv else 0, len(self.prompt))
            ends = (media.start + media.layout.length for media in self.prompt.media)
            images = sum(end <= processed for end in ends)
            return request.cached or 0, processed, images, request.started is not None
        return 0, 0, 0, False

    @property
    def generated_tokens(self) -> int:
        """Of all answers so far, finished or not."""
        running = sum(len(builder.tokens) for builder in list(self.running.values()))
        return self._finished_tokens + running

    def spans(self, submitted: float) -> list[tuple[str, float, float]]:
        """(name, start, end) of its phases up to now, `submitted` in the same clock."""
        if (timings := self._timings) is None or timings.first_token is None:
            return []
        first, end = submitted + timings.first_token, submitted + timings.total
        started = submitted + timings.queue
        return [
            ("queue", submitted, started),
            ("prefill", started, first),
            ("decode", first, end),
        ]

    async def queued(self) -> None:
        """Wait until it is in the engine's queue; raises the reason if it was rejected."""
        await self._queued.wait()
        if self._rejected:
            raise self._rejected

    async def next(self, seconds: float) -> list[AnswerDelta]:
        """The new deltas, one per answer; none after so many seconds of silence.

        Raises the error that ended the job. Nothing follows the end of every answer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        deltas = list(self._deltas.values())
        self._deltas.clear()
        if self._error and not deltas:
            raise self._error
        if not self._error:
            self._news.clear()
        return deltas

    def receive(self, item: AnswerDelta | Exception | None) -> None:
        """None once queued, or why it was rejected; then deltas, or the error that ended it."""
        if not self._queued.is_set():
            self._rejected = item if isinstance(item, Exception) else None
            self._queued.set()
            return
        if isinstance(item, AnswerDelta):
            if item.answer is not None:
                self._finished_tokens += item.answer.usage.generated
                self._timings = item.answer.timings
            earlier = self._deltas.get(item.index)
            self._deltas[item.index] = earlier + item if earlier else item
        else:
            self._error = item
        self._news.set()


class EngineThread:
    """The engine's thread. load: as of its last step. failed: for good; restart the process."""

    def __init__(self, bot: Chatbot) -> None:
        self.bot, self.engine = bot, bot.engine
        self.load: Load = bot.engine.load()
        self.failed = False
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._driver = EngineDriver(bot.engine, bot.processor.tokenizer, bot.max_new_tokens)
        self._outbox: list[tuple[ServerJob, AnswerDelta | Exception | None]] = []
        self._faults = 0
        self._step_start: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: ServerJob) -> None:
        """Queue a job, which receives None, then its deltas."""
        self._commands.put(lambda: self._add(job))

    def abort(self, job: ServerJob) -> None:
        """Abort a job's running answers and free their memory, before the next step."""
        self._commands.put(lambda: self._driver.abort(job))

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Call a function between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.engine))
            except Exception as error:  # noqa: BLE001  the caller's thread raises it
                future.set_exception(error)

        self._commands.put(run)
        return future

    def fail(self, error: Exception) -> None:
        """End all jobs with this error."""
        self._commands.put(lambda: self._fail(error))

    def close(self) -> None:
        """Stop between two steps and wait for it."""
        self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def step_seconds(self) -> float:
        """How long the current step has taken so far."""
        start = self._step_start
        return 0.0 if start is None else time.monotonic() - start

    def _run(self) -> None:
        use_threads(self.bot.model.config)
        while True:
            while self.failed or not self._commands.empty() or not self.engine.busy:
                self.load = self.engine.load()
                command = self._commands.get()
                if command is None:
                    return
                try:
                    command()
                except Exception as error:  # noqa: BLE001  the thread must not die silently
                    self._fail_for_good(error)
                if self.failed:
                    self._fail(RuntimeError("the engine has failed"))
                self._post()
            self._step_start = time.monotonic()
            self._step()
            self._step_start = None
            self._post()
            self.load = self.engine.load()

    def _post(self) -> None:
        """Send the outbox with one call per event loop: each call wakes it and takes the GIL."""
        outbox, self._outbox = self._outbox, []
        for loop, batch in itertools.groupby(outbox, lambda pair: pair[0].loop):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_receive, list(batch))

    def _fail_for_good(self, error: Exception) -> None:
        log.critical("the engine has failed for good", exc_info=error)
        self.failed = True
        self._fail(error)

    def _add(self, job: ServerJob) -> None:
        try:
            self._driver.add(job)
        except Exception as error:  # noqa: BLE001  fails this job only, the thread continues
            self._outbox.append((job, error))
        else:
            self._outbox.append((job, None))

    def _fail(self, error: Exception) -> None:
        for job in self._driver.jobs:
            self._outbox.append((_server_job(job), error))
            with contextlib.suppress(Exception):  # a failed engine may not be able to abort
                self._driver.abort(job)

    def _step(self) -> None:
        """A fault ends the requests of its step; repeated faults end the engine."""
        try:
            items = self._driver.step(MAX_PREFILL_DELAY)
            self._faults = 0
        except Exception as error:
            log.exception("a step of the engine failed")
            self._faults += 1
            if self._faults == MAX_FAULTS:
                self._fail_for_good(error)
            return
        for job, item in items:
            failure = _constraint_failure(job, item)
            if failure:
                self._driver.abort(job)
            self._outbox.append((_server_job(job), failure or item))


def _server_job(job: GenerationJob) -> ServerJob:
    assert isinstance(job, ServerJob)
    return job


def _constraint_failure(job: GenerationJob, item: AnswerDelta | Exception) -> OptionError | None:
    """Why an answer that has ended does not follow its response_format."""
    if isinstance(item, Exception) or item.answer is None or not job.constraints:
        return None
    matchers = job.constraints if job.orders else [job.constraints[item.index - job.index]]
    for matcher in matchers:
        if isinstance(matcher, GrammarMatcher) and matcher.failure:
            return OptionError(
                f"the answer cannot follow response_format any further: {matcher.failure}"
            )
    return None


def _receive(batch: list[tuple[ServerJob, AnswerDelta | Exception | None]]) -> None:
    for job, item in batch:
        job.receive(item)
