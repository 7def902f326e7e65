"""OpenAI's Responses API over the same engine. Nothing is stored."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any, Literal

from ..chat import AnswerDelta
from .answer_stream import AnswerStream, finish_reason, sse_event
from .api_errors import ApiError, error_body
from .openai_types import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    ResponseErrorEvent,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from .service import PreparedRequest


class ResponseStream(AnswerStream):
    """POST /v1/responses."""

    prefix = "resp_"
    end = b""

    def __init__(self, prepared: PreparedRequest) -> None:
        super().__init__(prepared)
        self.message_id = f"msg_{secrets.token_hex(12)}"
        self.sequence_number = 0
        self._at: dict[str, Any] = {
            "item_id": self.message_id,
            "output_index": 0,
            "content_index": 0,
        }

    async def __aiter__(self) -> AsyncIterator[list[bytes]]:
        empty, started = OutputText(text=""), self._response("in_progress", [])
        yield [
            self._event("response.created", response=started),
            self._event("response.in_progress", response=started),
            self._event(
                "response.output_item.added", output_index=0, item=self._message("in_progress", [])
            ),
            self._event("response.content_part.added", **self._at, part=empty),
        ]
        async for deltas in self.deltas():
            yield await self.written(self._text_deltas, deltas)
        if not self.prepared.request.stream:
            return
        yield await self.written(lambda _: self._last_events(), list(self.answers.values()))

    def _text_deltas(self, deltas: list[AnswerDelta]) -> list[bytes]:
        return [
            self._event(
                "response.output_text.delta",
                **self._at,
                delta=delta.text,
                logprobs=self.token_logprobs(delta.logprobs or ()),
            )
            for delta in deltas
            if delta.text or delta.logprobs
        ]

    def _last_events(self) -> list[bytes]:
        whole, at = self.body(), self._at
        (message,) = whole.output
        (part,) = message.content
        kind: Any = f"response.{whole.status}"
        return [
            self._event("response.output_text.done", **at, text=part.text, logprobs=part.logprobs),
            self._event("response.content_part.done", **at, part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(kind, response=whole),
        ]

    def error(self, error: ApiError) -> bytes:
        """OpenAI's `error` event."""
        body = error_body(error).error
        event = ResponseErrorEvent(
            code=body.code,
            message=body.message,
            param=body.param,
            sequence_number=self.sequence_number,
        )
        return sse_event(event, "error")

    def _event(self, kind: Any, **fields: Any) -> bytes:
        event = ResponseEvent(type=kind, sequence_number=self.sequence_number, **fields)
        self.sequence_number += 1
        return sse_event(event, kind)

    def _message(
        self,
        status: Literal["in_progress", "completed", "incomplete"],
        content: list[OutputText],
    ) -> OutputMessage:
        return OutputMessage(id=self.message_id, status=status, content=content)

    def body(self) -> ResponseObject:
        """The whole response."""
        answer = self.answers[0]
        part = OutputText(text=answer.text, logprobs=self.token_logprobs(answer.logprobs or ()))
        status: Literal["completed", "incomplete"] = (
            "completed" if finish_reason(answer) == "stop" else "incomplete"
        )
        response = self._response(status, [self._message(status, [part])])
        usage = self.usage()
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(**dict(usage.prompt_tokens_details)),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        response.timings = self.timings
        if status == "incomplete":
            response.incomplete_details = IncompleteDetails()
        return response

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete"],
        output: list[OutputMessage],
    ) -> ResponseObject:
        request, options = self.prepared.request, self.prepared.options
        assert isinstance(request, ResponsesRequest)
        text = request.text.format if request.text else None
        return ResponseObject(
            id=self.id,
            created_at=self.prepared.created,
            status=status,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=self.model,
            output=output,
            temperature=options.temperature,
            text={"format": text.model_dump(by_alias=True) if text else {"type": "text"}},
            top_logprobs=options.logprobs or 0,
            top_p=options.top_p,
            user=request.user,
        )
