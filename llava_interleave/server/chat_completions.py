"""An answer in OpenAI's form: chunks as they come, or folded from the very same chunks."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..chat import Answer, TokenLogprob
from ..processing import Tokenizer
from .api_errors import ClientDisconnected, body, to_api_error
from .attribution import How
from .engine_thread import TextDelta
from .requests import ChatRequest, ExplainRequest
from .service import PreparedRequest, Service

LEAST_LOGPROB = -9999.0
"""In the place of minus infinity, which JSON has not; OpenAI's number."""
SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
ALIVE = b": still here\n\n"
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class CancelOnDisconnect(Response):
    """A response whose work is cancelled when the client leaves."""

    def __init__(self, work: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self.work(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait((work,))
        if not work.cancelled():
            work.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def respond(service: Service, request: ChatRequest, key: str) -> Response:
    """The response to a chat request."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        async with service.answering(request, key) as asked:
            chat = Chat(service, asked)
            if request.stream:
                await _stream(service, chat, send)
                return
            whole = await chat.fold()
        await JSONResponse(whole)(scope, receive, send)

    return CancelOnDisconnect(work)


def respond_explained(service: Service, request: ExplainRequest, key: str) -> Response:
    """The response to a request to explain an answer that was given before."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(await service.explaining(request, key))(scope, receive, send)

    return CancelOnDisconnect(work)


async def _stream(service: Service, chat: Chat, send: Send) -> None:
    """Server-sent events. What goes wrong from here on is an event, too."""
    await send({"type": "http.response.start", "status": 200, "headers": SSE})

    async def event(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    try:
        async for chunks in chat:
            await event(b"".join(map(server_sent, chunks)) or ALIVE)
    except ClientDisconnected:
        raise
    except Exception as error:  # noqa: BLE001  the status has been sent: the client is told here
        await event(server_sent(body(service.metrics.refused(to_api_error(error)))), more=False)
    else:
        await event(b"data: [DONE]\n\n", more=False)


def server_sent(data: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return f"data: {JSON.encode(data)}\n\n".encode("utf-8", "replace")


class Chat:
    """The chunks of one request, to be read once."""

    def __init__(self, service: Service, asked: PreparedRequest) -> None:
        self.service, self.asked, self.request = service, asked, asked.request
        self.tokenizer = service.bot.processor.tokenizer
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.answers: dict[int, Answer] = {}

    async def __aiter__(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Those that are ready, together; none after `sse_keepalive` seconds of silence."""
        job, silence, n = (
            self.asked.job,
            self.service.settings.sse_keepalive,
            self.asked.job.options.n,
        )
        usage = (
            self.request.stream_options is not None and self.request.stream_options.include_usage
        )
        more: dict[str, Any] = {"usage": None} if usage else {}
        yield [
            self._chunk([_choice(index, {"role": "assistant", "content": ""})]) | more
            for index in range(n)
        ]
        while len(self.answers) < n:
            yield [self._said(piece) | more for piece in await job.next(silence)]
        if how := self.request.explain:
            explaining = asyncio.ensure_future(self._explained(how))
            try:
                while not (await asyncio.wait((explaining,), timeout=silence))[0]:
                    yield []
            finally:
                explaining.cancel()
            yield [self._chunk([]) | more | {"explanations": explaining.result()}]
        if usage:
            yield [self._chunk([]) | {"usage": self.usage()}]

    def _said(self, piece: TextDelta) -> dict[str, Any]:
        """The chunk of a piece; with the last one come the timings."""
        choice = _choice(
            piece.index, {"content": piece.text} if piece.text else {}, self._logprobs(piece)
        )
        if piece.answer is None:
            return self._chunk([choice])
        self.answers[piece.index] = piece.answer
        self.service.metrics.finished(piece.answer)
        choice["finish_reason"] = piece.answer.finish_reason
        last = len(self.answers) == self.asked.job.options.n
        return self._chunk([choice]) | ({"timings": self.timings(piece.answer)} if last else {})

    async def _explained(self, how: How) -> list[dict[str, Any]]:
        job = self.asked.job
        return [
            {
                "index": index,
                **await self.service.explain(job.prompt, answer.tokens, how, job.options.adapter),
            }
            for index, answer in sorted(self.answers.items())
        ]

    async def fold(self) -> dict[str, Any]:
        """The whole answer, made of the chunks."""
        whole: dict[str, Any] = {}
        choices: list[dict[str, Any]] = []
        async for chunks in self:
            for chunk in chunks:
                whole |= chunk
                for choice in chunk["choices"]:
                    self._fold(choice, choices)
        return whole | {"object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _fold(self, choice: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        delta = choice["delta"]
        if "role" in delta:
            message = {"role": "assistant", "content": "", "refusal": None}
            logprobs: dict[str, Any] | None = (
                {"content": [], "refusal": None} if self.request.logprobs else None
            )
            choices.append(
                {
                    "index": choice["index"],
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": None,
                }
            )
            return
        into = choices[choice["index"]]
        into["message"]["content"] += delta.get("content", "")
        into["finish_reason"] = choice["finish_reason"]
        if choice["logprobs"]:
            into["logprobs"]["content"] += choice["logprobs"]["content"]

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, counted once for all answers, and of all answers."""
        first = self.answers[0].usage
        written = sum(answer.usage.generated for answer in self.answers.values())
        return {
            "prompt_tokens": first.prompt,
            "completion_tokens": written,
            "total_tokens": first.prompt + written,
            "prompt_tokens_details": {
                "cached_tokens": first.cached,
                "image_tokens": self.asked.image_tokens,
            },
        }

    def timings(self, last: Answer | None) -> dict[str, Any]:
        """Seconds, of the answer that ended last; `prepare` is what came before the engine's queue."""
        assert last is not None
        return {"prepare": self.asked.prepared, **dataclasses.asdict(last.timings)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.asked.created,
            "model": self.request.model,
            "choices": choices,
        }

    def _logprobs(self, piece: TextDelta) -> dict[str, Any] | None:
        return (
            {"content": [self._token(told) for told in piece.logprobs], "refusal": None}
            if piece.logprobs
            else None
        )

    def _token(self, told: TokenLogprob) -> dict[str, Any]:
        top = [_logprob(self.tokenizer, token, logprob) for token, logprob in told.top]
        return _logprob(self.tokenizer, told.token, told.logprob) | {"top_logprobs": top}


def _logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token, skip_special=False)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(data),
    }


def _choice(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
