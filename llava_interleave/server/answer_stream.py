"""A request's answers as server-sent events, or as one body; the base of the generating routes."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..chat import Answer, AnswerDelta, TokenLogprob
from .access_log import current_record
from .api_errors import ApiError, ClientDisconnected, error_body, to_api_error
from .engine_thread import ServerJob
from .models import ServedModels
from .openai_types import (
    GenerationRequest,
    PromptTokensDetails,
    Timings,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from .service import PreparedRequest, Service

T = TypeVar("T")
A = TypeVar("A", Answer, AnswerDelta)
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI's number."""
MAX_INLINE_LOGPROBS = 2000
"""Log-probabilities that the event loop writes at a time; more are written in a thread."""
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
SSE_KEEPALIVE = b": keep-alive\n\n"


class CancelOnDisconnect(Response):
    """A response whose work is cancelled when the client disconnects."""

    def __init__(self, work: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self.work(scope, receive, send))
        disconnected = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, disconnected), return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnected.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait((work,))
        if work.cancelled():
            current_record().error = "client_disconnected"
        else:
            work.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def respond_json(work: Callable[[], Awaitable[BaseModel]]) -> Response:
    """The response whose body `work` computes; it is cancelled when the client disconnects."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await json_response(await work())(scope, receive, send)

    return CancelOnDisconnect(respond)


def json_response(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def sse_event(data: BaseModel, name: str = "") -> bytes:
    """An event of a stream."""
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {data.model_dump_json()}\n\n".encode()


class AnswerStream(ABC):
    """The events of one request, iterated once. `body` is the whole response after that.

    prefix: of the response's id. end: the last bytes of a stream.
    """

    prefix: ClassVar[str]
    end: ClassVar[bytes] = b"data: [DONE]\n\n"

    def __init__(self, prepared: PreparedRequest) -> None:
        self.service, self.prepared = prepared.service, prepared
        self.tokenizer = self.service.bot.processor.tokenizer
        self.id = f"{self.prefix}{secrets.token_hex(12)}"
        self.answers: dict[int, Answer] = {}
        self.model = prepared.options.adapter or self.service.name
        self.timings: Timings | None = None

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        """Lists of events that are ready; an empty one after `sse_keepalive` seconds of silence."""

    @abstractmethod
    def body(self) -> BaseModel:
        """The whole response."""

    def error(self, error: ApiError) -> bytes:
        """The event of an error that ends the stream."""
        return sse_event(error_body(error))

    async def whole(self) -> BaseModel:
        """`body`, once all answers are complete."""
        return await self.written(lambda _: self.body(), list(self.answers.values()))

    async def written(self, write: Callable[[list[A]], T], answers: list[A]) -> T:
        """What `write` makes of answers or their deltas."""
        each = 1 + (self.prepared.options.logprobs or 0)
        if each * sum(len(one.logprobs or ()) for one in answers) <= MAX_INLINE_LOGPROBS:
            return write(answers)
        return await self.service.run_in_pool(self.prepared.key, lambda: write(answers))

    async def deltas(self) -> AsyncIterator[list[AnswerDelta]]:
        """Deltas of all answers as they come; none where the response is one body."""
        for job in self.prepared.jobs:
            indices = range(job.index, job.index + job.options.n)
            while not self.answers.keys() >= {*indices}:
                deltas = await self.next(job, self.service.settings.sse_keepalive)
                if self.prepared.request.stream:
                    yield deltas

    async def next(self, job: ServerJob, seconds: float) -> list[AnswerDelta]:
        """As `ServerJob.next`; `answers` and `timings` fill up."""
        deltas = await job.next(seconds)
        for answer, index in ((delta.answer, delta.index) for delta in deltas):
            if answer is not None:
                self.answers[index] = answer
                self.service.metrics.count_answer(answer)
                self.timings = Timings(
                    prepare=self.prepared.seconds, **dataclasses.asdict(answer.timings)
                )
        return deltas

    @property
    def complete(self) -> bool:
        """Whether all answers have ended."""
        return len(self.answers) == self.prepared.num_answers

    def usage(self) -> Usage:
        prompts = [self.answers[job.index].usage for job in self.prepared.jobs]
        prompt = sum(usage.prompt for usage in prompts)
        generated = sum(answer.usage.generated for answer in self.answers.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(usage.cached for usage in prompts),
                image_tokens=self.prepared.image_tokens,
            ),
        )

    def token_logprobs(self, tokens: Sequence[TokenLogprob]) -> list[TokenLogprobs]:
        return [
            TokenLogprobs(
                **dict(self._logprob(token.token, token.logprob)),
                top_logprobs=[self._logprob(*pair) for pair in token.top],
            )
            for token in tokens
        ]

    def _logprob(self, token: int, logprob: float) -> TopLogprob:
        data = self.tokenizer.token_bytes(token, skip_special=False)
        return TopLogprob(
            token=data.decode("utf-8", "replace"),
            logprob=max(logprob, MIN_LOGPROB),
            bytes=list(data),
        )


def finish_reason(answer: Answer) -> Literal["stop", "length"]:
    """In OpenAI's values, which strict clients check: an answer that repeats itself was cut off."""
    return "stop" if answer.finish_reason == "stop" else "length"


def stop_reason(answer: Answer) -> Literal["repetition"] | None:
    return "repetition" if answer.finish_reason == "repetition" else None


async def answer(
    service: Service | ServedModels,
    kind: type[AnswerStream],
    request: GenerationRequest,
    key: str,
    batch: str = "",
) -> BaseModel:
    """The whole response to a request. batch: as of `Service.generation`."""
    async with service.generation(request, key, batch) as prepared:
        stream = kind(prepared)
        async for _ in stream:
            pass
        return await stream.whole()


def respond(
    service: Service | ServedModels,
    kind: type[AnswerStream],
    request: GenerationRequest,
    key: str,
) -> Response:
    """The response to a request: server-sent events with `stream`, otherwise one body."""
    if not request.stream:
        return respond_json(lambda: answer(service, kind, request, key))

    async def work(_: Scope, __: Receive, send: Send) -> None:
        async with service.generation(request, key) as prepared:
            await send_events(kind(prepared), send)

    return CancelOnDisconnect(work)


class EventStream(Protocol):
    """What `send_events` sends."""

    @property
    def service(self) -> Service | ServedModels: ...
    @property
    def end(self) -> bytes: ...
    def __aiter__(self) -> AsyncIterator[list[bytes]]: ...
    def error(self, error: ApiError) -> bytes: ...


async def send_events(stream: EventStream, send: Send) -> None:
    """Server-sent events. The status is sent first, so an error after it is an event as well."""
    await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})

    async def event(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    try:
        async for events in stream:
            await event(b"".join(events) or SSE_KEEPALIVE)
    except ClientDisconnected:
        raise
    except Exception as error:  # noqa: BLE001  the client gets it as an event
        await event(
            stream.error(stream.service.metrics.count_error(to_api_error(error))), more=False
        )
    else:
        await event(stream.end, more=False)
