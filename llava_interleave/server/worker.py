"""The one thread that computes. It owns the engine; everybody else hands it jobs and reads the pieces it sends back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from ..chatbot import Answer, Chatbot, Options, TokenLogprob
from ..chatbot.bot import Writer, sampling
from ..engine import Event, Load, Request
from ..errors import OptionError
from ..prompt import Prompt
from .grammar import Guided

log = logging.getLogger("llava_interleave.server")
FAULTS = 3
"""So many steps that fail one after the other, and the engine is given up."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of answer `index`: text, its tokens where log-probabilities are asked for, at its end the whole answer."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    answer: Answer | None = None


@dataclass(slots=True, eq=False)
class Job:
    """`options.n` answers to one prompt. The event loop makes it and reads it, the engine's thread fills it."""

    prompt: Prompt
    options: Options
    salt: bytes
    loop: asyncio.AbstractEventLoop
    guides: list[Guided] = field(default_factory=list)  # one an answer, where their form is given
    pieces: asyncio.Queue[Piece | Exception | None] = field(default_factory=asyncio.Queue)  # None: it is in the engine's queue
    requests: list[Request] = field(default_factory=list)  # the thread's own

    async def next(self) -> Piece | None:
        """The next piece; raises what ended the job. Nothing comes after every answer has ended."""
        item = await self.pieces.get()
        if isinstance(item, Exception):
            raise item
        return item

    def tell(self, item: Piece | Exception | None) -> None:
        """From any thread. A loop that is closed has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Worker:
    """The engine's thread. `load` is as of its last step; `failed`: it has given up, and only a new process helps."""

    def __init__(self, bot: Chatbot) -> None:
        self.bot, self.engine = bot, bot.engine
        self.load: Load = bot.engine.load()
        self.failed = False
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._writing: dict[Request, tuple[Job, Writer]] = {}
        self._faults = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job: it is told None, then its pieces."""
        self._orders.put(lambda: self._add(job))

    def abort(self, job: Job) -> None:
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
            self._step()
            self.load = self.engine.load()

    def _give_up(self, error: Exception) -> None:
        log.critical("the engine has failed for good", exc_info=error)
        self.failed = True
        self._fail(error)

    def _add(self, job: Job) -> None:
        room = self.bot.model.config.text.context - len(job.prompt)
        try:
            for index in range(job.options.n):
                guide = job.guides[index] if job.guides else None
                how = sampling(job.options, index, room)
                request = self.engine.add(job.prompt, how, salt=job.salt, guide=guide, adapter=job.options.adapter)
                job.requests.append(request)
                self._writing[request] = (job, Writer(self.bot.processor, job.options, index))
        except Exception as error:  # noqa: BLE001  the client's mistake or ours: its own request fails, the thread goes on
            self._end(job, error)
        else:
            job.tell(None)

    def _drop(self, job: Job) -> None:
        for request in job.requests:
            self._writing.pop(request, None)
            self.engine.abort(request)
        job.requests.clear()

    def _end(self, job: Job, error: Exception) -> None:
        self._drop(job)
        job.tell(error)

    def _fail(self, error: Exception) -> None:
        for job in {id(job): job for job, _ in self._writing.values()}.values():
            job.tell(error)
            with contextlib.suppress(Exception):  # an engine that has failed may not even be able to let go
                self._drop(job)
        self._writing.clear()

    def _step(self) -> None:
        """A fault ends the requests of its step, of which the engine tells in the next; one that comes again and again, all."""
        try:
            events = self.engine.step()
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

    def _write(self, event: Event, job: Job, writer: Writer) -> None:
        if event.error is not None:
            raise event.error
        text = writer.write(event)
        logprobs = tuple(writer.logprobs[-1:]) if writer.logprobs and event.finish_reason != "stop" else ()
        if event.finish_reason or writer.stops.stopped:
            if job.guides and (failure := job.guides[writer.index].failure):
                raise OptionError(f"the answer cannot follow response_format any further: {failure}")
            self.engine.abort(event.request)
            del self._writing[event.request]
            last = writer.last(text, event)
            job.tell(Piece(last.index, last.text, logprobs, last.answer))
        elif text or logprobs:
            job.tell(Piece(writer.index, text, logprobs))
