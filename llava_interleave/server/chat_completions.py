"""Chat completions in OpenAI's form: a stream of chunks, or one body made of the same answers."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..chat import Answer, AnswerDelta, TokenLogprob
from .access_log import current_record
from .api_errors import ClientDisconnected, error_body, to_api_error
from .models import ServedModels
from .openai_types import (
    AttributionMode,
    AttributionRequest,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChoiceAttribution,
    ChunkChoice,
    Delta,
    Logprobs,
    Message,
    PromptProgress,
    PromptRequest,
    PromptTokensDetails,
    Timings,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from .service import PreparedRequest, Service

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI's number."""
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
SSE_KEEPALIVE = b": keep-alive\n\n"
SSE_DONE = b"data: [DONE]\n\n"
PROGRESS_INTERVAL = 0.2
"""Seconds between two looks at the progress of a prompt."""


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


def respond(service: Service | ServedModels, request: ChatRequest, key: str) -> Response:
    """The response to a chat request."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async with service.generation(request, key) as prepared:
            stream = CompletionStream(prepared)
            if request.stream:
                await _send_events(stream, send)
                return
            async for _ in stream:
                pass
            body = stream.completion()
        await _json(body)(scope, receive, send)

    return CancelOnDisconnect(work)


def respond_attribution(
    service: Service | ServedModels, request: AttributionRequest, key: str
) -> Response:
    """The response to an attribution request about a given answer."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await _json(await service.attribute_answer(request, key))(scope, receive, send)

    return CancelOnDisconnect(work)


def respond_prefill(service: Service | ServedModels, request: PromptRequest, key: str) -> Response:
    """The response to a prefill request; leaving ends it."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await _json(await service.prefill(request, key))(scope, receive, send)

    return CancelOnDisconnect(work)


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


async def _send_events(stream: CompletionStream, send: Send) -> None:
    """Server-sent events. The status is sent first, so an error after it is an event as well."""
    await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})

    async def event(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    try:
        async for chunks in stream:
            await event(b"".join(map(sse_event, chunks)) or SSE_KEEPALIVE)
    except ClientDisconnected:
        raise
    except Exception as error:  # noqa: BLE001  the client gets it as an event
        body = error_body(stream.service.metrics.count_error(to_api_error(error)))
        await event(sse_event(body), more=False)
    else:
        await event(SSE_DONE, more=False)


def _finish_reason(answer: Answer) -> Literal["stop", "length"]:
    """In OpenAI's values, which strict clients check: an answer that repeats itself was cut off."""
    return "stop" if answer.finish_reason == "stop" else "length"


def _stop_reason(answer: Answer) -> Literal["repetition"] | None:
    return "repetition" if answer.finish_reason == "repetition" else None


def sse_event(data: BaseModel) -> bytes:
    """An event of a stream."""
    return f"data: {data.model_dump_json()}\n\n".encode()


class CompletionStream:
    """The chunks of one request, iterated once. `completion` is the whole body after that."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self.service, self.prepared, self.request = prepared.service, prepared, prepared.request
        self.tokenizer = self.service.bot.processor.tokenizer
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.answers: dict[int, Answer] = {}
        self.model = prepared.job.options.adapter or self.service.name
        self.timings: Timings | None = None
        self.attributions: list[ChoiceAttribution] | None = None

    async def __aiter__(self) -> AsyncIterator[list[ChatCompletionChunk]]:
        """Lists of chunks that are ready; an empty one after `sse_keepalive` seconds of silence."""
        job, options = self.prepared.job, self.request.stream_options
        silence = self.service.settings.sse_keepalive
        yield [
            self._chunk([ChunkChoice(index=i, delta=Delta(role="assistant", content=""))])
            for i in range(job.options.n)
        ]
        if self.request.return_progress:
            async for chunks in self._progress(silence):
                yield chunks
        while len(self.answers) < job.options.n:
            yield [self._delta_chunk(delta) for delta in await job.next(silence)]
        if mode := self.request.attribution:
            task = asyncio.ensure_future(self._attribute(mode))
            try:
                while not (await asyncio.wait((task,), timeout=silence))[0]:
                    yield []
            finally:
                task.cancel()
                await asyncio.wait((task,))
            self.attributions = task.result()
            yield [self._chunk([], attributions=self.attributions)]
        if options is not None and options.include_usage:
            yield [self._chunk([], usage=self._usage())]

    async def _progress(self, silence: float) -> AsyncIterator[list[ChatCompletionChunk]]:
        """Chunks with the progress of the prompt wherever it has changed, up to the first delta."""
        job, start, last = self.prepared.job, time.monotonic(), None
        spoken = start
        while True:
            now, state = time.monotonic(), (job.progress(), self.service.engine_thread.load.waiting)
            if state != last:
                last, spoken = state, now
                yield [self._chunk([], progress=self._progress_info(now - start))]
            elif now - spoken > silence:
                spoken = now
                yield []
            if deltas := await job.next(min(PROGRESS_INTERVAL, silence)):
                yield [self._delta_chunk(delta) for delta in deltas]
                return

    def _progress_info(self, seconds: float) -> PromptProgress:
        job = self.prepared.job
        cached, processed, images, started = job.progress()
        return PromptProgress(
            total=len(job.prompt),
            cache=cached,
            processed=processed,
            time_ms=round(seconds * 1000),
            images=len(job.prompt.media),
            images_processed=images,
            waiting=0 if started else max(1, self.service.engine_thread.load.waiting),
        )

    def _delta_chunk(self, delta: AnswerDelta) -> ChatCompletionChunk:
        """The chunk of a delta; the last one has the timings."""
        choice = ChunkChoice(
            index=delta.index,
            delta=Delta(content=delta.text or None),
            logprobs=self._logprobs(delta.logprobs) if delta.logprobs else None,
        )
        if (answer := delta.answer) is None:
            return self._chunk([choice])
        self.answers[delta.index] = answer
        self.service.metrics.count_answer(answer)
        choice.finish_reason = _finish_reason(answer)
        choice.stop_reason = _stop_reason(answer)
        if len(self.answers) == self.prepared.job.options.n:
            self.timings = Timings(
                prepare=self.prepared.seconds, **dataclasses.asdict(answer.timings)
            )
        return self._chunk([choice], timings=self.timings)

    async def _attribute(self, mode: AttributionMode) -> list[ChoiceAttribution]:
        job, attribute = self.prepared.job, self.service.attribute
        adapter = job.options.adapter
        return [
            ChoiceAttribution(
                index=i, **dict(await attribute(job.prompt, answer.tokens, mode, adapter))
            )
            for i, answer in sorted(self.answers.items())
        ]

    def _chunk(
        self,
        choices: list[ChunkChoice],
        *,
        usage: Usage | None = None,
        timings: Timings | None = None,
        progress: PromptProgress | None = None,
        attributions: list[ChoiceAttribution] | None = None,
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            created=self.prepared.created,
            model=self.model,
            choices=choices,
            usage=usage,
            timings=timings,
            prompt_progress=progress,
            attributions=attributions,
        )

    def completion(self) -> ChatCompletion:
        """The whole response body."""
        assert self.timings is not None
        return ChatCompletion(
            id=self.id,
            created=self.prepared.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=Message(content=answer.text),
                    logprobs=None if answer.logprobs is None else self._logprobs(answer.logprobs),
                    finish_reason=_finish_reason(answer),
                    stop_reason=_stop_reason(answer),
                )
                for index, answer in sorted(self.answers.items())
            ],
            usage=self._usage(),
            timings=self.timings,
            attributions=self.attributions,
        )

    def _usage(self) -> Usage:
        first = self.answers[0].usage
        generated = sum(answer.usage.generated for answer in self.answers.values())
        return Usage(
            prompt_tokens=first.prompt,
            completion_tokens=generated,
            total_tokens=first.prompt + generated,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=first.cached, image_tokens=self.prepared.image_tokens
            ),
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Logprobs:
        return Logprobs(
            content=[
                TokenLogprobs(
                    **dict(self._logprob(token.token, token.logprob)),
                    top_logprobs=[self._logprob(*pair) for pair in token.top],
                )
                for token in tokens
            ]
        )

    def _logprob(self, token: int, logprob: float) -> TopLogprob:
        data = self.tokenizer.token_bytes(token, skip_special=False)
        return TopLogprob(
            token=data.decode("utf-8", "replace"),
            logprob=max(logprob, MIN_LOGPROB),
            bytes=list(data),
        )
