"""The one thread that computes. It owns the engine; everybody else hands it jobs and reads the pieces it sends back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from ..chat import Answer, Chatbot, Options, TokenLogprob
from ..chat.chatbot import AnswerBuilder, sampling
from ..engine import Event, Load, Request
from ..errors import OptionError
from ..prompt import Prompt
from .structured_output import GrammarMatcher

log = logging.getLogger("llava_interleave.server")
FAULTS = 3
"""So many steps that fail one after the other, and the engine is given up."""
MAX_PREFILL_DELAY = 0.2
"""Seconds that answers under way wait for the prompts of others, as `Engine.step`."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of answer `index`: text, its tokens where log-probabilities are asked for, at its end the whole answer."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    answer: Answer | None = None

    def __add__(self, later: TextDelta) -> TextDelta:
        """Both as one, of the same answer."""
        return TextDelta(
            self.index, self.text + later.text, self.logprobs + later.logprobs, later.answer
        )


@dataclass(slots=True, eq=False)
class GenerationJob:
    """`options.n` answers to one prompt. The event loop makes it and reads it, the engine's thread fills it."""

    prompt: Prompt
    options: Options
    salt: bytes
    loop: asyncio.AbstractEventLoop
    guides: list[GrammarMatcher] = field(
        default_factory=list
    )  # one an answer, where their form is given
    requests: list[Request] = field(default_factory=list)  # the thread's own
    _taken: asyncio.Event = field(default_factory=asyncio.Event)
    _told: asyncio.Event = field(default_factory=asyncio.Event)
    _pieces: dict[int, TextDelta] = field(
        default_factory=dict
    )  # by answer: a reader that is late finds one of each
    _refused: Exception | None = None
    _error: Exception | None = None

    async def taken(self) -> None:
        """Until it is in the engine's queue; raises what kept it out."""
        await self._taken.wait()
        if self._refused:
            raise self._refused

    async def next(self, seconds: float) -> list[TextDelta]:
        """What has come since, one piece an answer; nothing after so many seconds of silence. Raises what ended the job.

        Nothing comes after every answer has ended.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._told.wait()
        pieces = list(self._pieces.values())
        self._pieces.clear()
        if self._error and not pieces:
            raise self._error
        if not self._error:
            self._told.clear()
        return pieces

    def hear(self, item: TextDelta | Exception | None) -> None:
        """First None, or what kept it out; then pieces, or what ended it. On the event loop."""
        if not self._taken.is_set():
            self._refused = item if isinstance(item, Exception) else None
            self._taken.set()
            return
        if isinstance(item, TextDelta):
            before = self._pieces.get(item.index)
            self._pieces[item.index] = before + item if before else item
        else:
            self._error = item
        self._told.set()


class EngineThread:
    """The engine's thread. `load` is as of its last step; `failed`: it has given up, and only a new process helps."""

    def __init__(self, bot: Chatbot) -> None:
        self.bot, self.engine = bot, bot.engine
        self.load: Load = bot.engine.load()
        self.failed = False
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._writing: dict[Request, tuple[GenerationJob, AnswerBuilder]] = {}
        self._news: list[tuple[GenerationJob, TextDelta | Exception | None]] = []
        self._faults = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: GenerationJob) -> None:
        """Queue a job: it is told None, then its pieces."""
        self._orders.put(lambda: self._add(job))

    def abort(self, job: GenerationJob) -> None:
        """End what is left of a job and give back its memory; before the next step."""
        self._orders.put(lambda: self._drop(job))

    def fail(self, error: Exception) -> None:
        """End everything with this error."""
        self._orders.put(lambda: self._fail(error))

    def close(self) -> None:
        """Stop between two steps and wait for it."""
        self._orders.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            while self.failed or not self._orders.empty() or not self.engine.busy:
                self.load = self.engine.load()
                order = self._orders.get()
                if order is None:
                    return
                try:
                    order()
                except Exception as error:  # noqa: BLE001  the thread must not die unseen
                    self._give_up(error)
                if self.failed:
                    self._fail(RuntimeError("the engine has failed"))
                self._post()
            self._step()
            self._post()
            self.load = self.engine.load()

    def _tell(self, job: GenerationJob, item: TextDelta | Exception | None) -> None:
        self._news.append((job, item))

    def _post(self) -> None:
        """Hand over all that was told, by one call for each event loop: a call wakes it, and takes the interpreter from here."""
        news, self._news = self._news, []
        for loop, told in itertools.groupby(news, lambda pair: pair[0].loop):
            with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody left to tell
                loop.call_soon_threadsafe(_hear, list(told))

    def _give_up(self, error: Exception) -> None:
        log.critical("the engine has failed for good", exc_info=error)
        self.failed = True
        self._fail(error)

    def _add(self, job: GenerationJob) -> None:
        room = self.bot.model.config.text.context - len(job.prompt)
        try:
            for index in range(job.options.n):
                guide = job.guides[index] if job.guides else None
                how = sampling(job.options, index, room)
                request = self.engine.add(
                    job.prompt, how, salt=job.salt, guide=guide, adapter=job.options.adapter
                )
                job.requests.append(request)
                self._writing[request] = (
                    job,
                    AnswerBuilder(self.bot.processor, job.options, index),
                )
        except Exception as error:  # noqa: BLE001  the client's mistake or ours: its own request fails, the thread goes on
            self._end(job, error)
        else:
            self._tell(job, None)

    def _drop(self, job: GenerationJob) -> None:
        for request in job.requests:
            self._writing.pop(request, None)
            self.engine.abort(request)
        job.requests.clear()

    def _end(self, job: GenerationJob, error: Exception) -> None:
        self._drop(job)
        self._tell(job, error)

    def _fail(self, error: Exception) -> None:
        for job in {id(job): job for job, _ in self._writing.values()}.values():
            self._tell(job, error)
            with contextlib.suppress(
                Exception
            ):  # an engine that has failed may not even be able to let go
                self._drop(job)
        self._writing.clear()

    def _step(self) -> None:
        """A fault ends the requests of its step, of which the engine tells in the next; one that comes again and again, all."""
        try:
            events = self.engine.step(MAX_PREFILL_DELAY)
            self._faults = 0
        except Exception as error:
            log.exception("a step of the engine failed")
            self._faults += 1
            if self._faults == FAULTS:
                self._give_up(error)
            return
        for event in events:
            if event.request in self._writing:
                job, writer = self._writing[event.request]
                try:
                    self._write(event, job, writer)
                except Exception as error:  # noqa: BLE001  as in _add
                    self._end(job, error)

    def _write(self, event: Event, job: GenerationJob, writer: AnswerBuilder) -> None:
        if event.error is not None:
            raise event.error
        text = writer.write(event)
        logprobs = (
            tuple(writer.logprobs[-1:]) if writer.logprobs and event.finish_reason != "stop" else ()
        )
        if event.finish_reason or writer.stops.stopped:
            if job.guides and (failure := job.guides[writer.index].failure):
                raise OptionError(
                    f"the answer cannot follow response_format any further: {failure}"
                )
            self.engine.abort(event.request)
            del self._writing[event.request]
            last = writer.last(text, event)
            self._tell(job, TextDelta(last.index, last.text, logprobs, last.answer))
        elif text or logprobs:
            self._tell(job, TextDelta(writer.index, text, logprobs))


def _hear(news: list[tuple[GenerationJob, TextDelta | Exception | None]]) -> None:
    for job, item in news:
        job.hear(item)
