"""Chat completions in OpenAI's form: a stream of chunks, or one body made of the same answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from ..chat import AnswerDelta, TokenLogprob
from .answer_stream import AnswerStream, finish_reason, sse_event, stop_reason
from .openai_types import (
    AttributionMode,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChoiceAttribution,
    ChunkChoice,
    Delta,
    ImageCitation,
    Logprobs,
    Message,
    PromptProgress,
    Usage,
)
from .service import PreparedRequest

PROGRESS_INTERVAL = 0.2
"""Seconds between two looks at the progress of a prompt."""


class ChatCompletionStream(AnswerStream):
    """POST /v1/chat/completions."""

    prefix = "chatcmpl-"
    attributions: list[ChoiceAttribution] | None = None

    def __init__(self, prepared: PreparedRequest) -> None:
        super().__init__(prepared)
        self.citations: dict[int, list[ImageCitation]] = {}

    async def __aiter__(self) -> AsyncIterator[list[bytes]]:
        request = self.prepared.request
        assert isinstance(request, ChatRequest)
        yield [
            self._chunk([ChunkChoice(index=i, delta=Delta(role="assistant", content=""))])
            for i in range(self.prepared.num_answers)
        ]
        if request.return_progress:
            async for chunks in self._progress():
                yield chunks
        async for deltas in self.deltas():
            yield await self.written(self._delta_chunks, deltas)
        if request.cite:
            citing = asyncio.ensure_future(self._cite())
            async with contextlib.aclosing(self._wait(citing)) as silences:
                async for _ in silences:
                    yield []
            self.citations = citing.result()
            yield [
                self._chunk([ChunkChoice(index=i, delta=Delta(annotations=annotations))])
                for i, annotations in self.citations.items()
            ]
        if mode := request.attribution:
            task = asyncio.ensure_future(self._attribute(mode))
            async with contextlib.aclosing(self._wait(task)) as silences:
                async for _ in silences:
                    yield []
            self.attributions = task.result()
            yield [self._chunk([], attributions=self.attributions)]
        if request.stream_options is not None and request.stream_options.include_usage:
            yield [self._chunk([], usage=self.usage())]

    async def _wait(self, task: asyncio.Future[Any]) -> AsyncGenerator[None]:
        """Wait for work, which is cancelled with the stream; an item after each silence."""
        try:
            silence = self.service.settings.sse_keepalive
            while not (await asyncio.wait((task,), timeout=silence))[0]:
                yield
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def _progress(self) -> AsyncIterator[list[bytes]]:
        """Chunks with the progress of the prompt wherever it has changed, up to the first delta."""
        (job,), start, last = self.prepared.jobs, time.monotonic(), None
        spoken, silence = start, self.service.settings.sse_keepalive
        while True:
            now, state = time.monotonic(), (job.progress(), self.service.engine_thread.load.waiting)
            if state != last:
                last, spoken = state, now
                yield [self._chunk([], progress=self._progress_info(now - start))]
            elif now - spoken > silence:
                spoken = now
                yield []
            if deltas := await self.next(job, min(PROGRESS_INTERVAL, silence)):
                yield await self.written(self._delta_chunks, deltas)
                return

    def _progress_info(self, seconds: float) -> PromptProgress:
        (job,) = self.prepared.jobs
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

    def _delta_chunks(self, deltas: list[AnswerDelta]) -> list[bytes]:
        return [self._delta_chunk(delta) for delta in deltas]

    def _delta_chunk(self, delta: AnswerDelta) -> bytes:
        """The chunk of a delta; the last one has the timings."""
        choice = ChunkChoice(
            index=delta.index,
            delta=Delta(content=delta.text or None),
            logprobs=self._logprobs(delta.logprobs) if delta.logprobs else None,
        )
        if (answer := delta.answer) is None:
            return self._chunk([choice])
        choice.finish_reason = finish_reason(answer)
        choice.stop_reason = stop_reason(answer)
        last = self.complete and delta.index == list(self.answers)[-1]
        return self._chunk([choice], last=last)

    async def _attribute(self, mode: AttributionMode) -> list[ChoiceAttribution]:
        (job,), attribute = self.prepared.jobs, self.service.attribute
        found = []
        for i, answer in sorted(self.answers.items()):
            tokens, adapter = answer.tokens, job.options.adapter
            one = await attribute(job.prompt, tokens, mode, adapter, job.salt)
            found.append(ChoiceAttribution(index=i, **dict(one)))
        return found

    async def _cite(self) -> dict[int, list[ImageCitation]]:
        (job,), cite = self.prepared.jobs, self.service.cite
        return {
            i: await cite(job.prompt, answer, job.options.adapter, job.salt)
            for i, answer in sorted(self.answers.items())
        }

    def _chunk(
        self,
        choices: list[ChunkChoice],
        *,
        usage: Usage | None = None,
        last: bool = False,
        progress: PromptProgress | None = None,
        attributions: list[ChoiceAttribution] | None = None,
    ) -> bytes:
        return sse_event(
            ChatCompletionChunk(
                id=self.id,
                created=self.prepared.created,
                model=self.model,
                choices=choices,
                usage=usage,
                prompt_progress=progress,
                timings=self.timings if last else None,
                attributions=attributions,
            )
        )

    def body(self) -> ChatCompletion:
        """The whole response body."""
        assert self.timings is not None
        return ChatCompletion(
            id=self.id,
            created=self.prepared.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=Message(content=answer.text, annotations=self.citations.get(index)),
                    logprobs=None if answer.logprobs is None else self._logprobs(answer.logprobs),
                    finish_reason=finish_reason(answer),
                    stop_reason=stop_reason(answer),
                )
                for index, answer in sorted(self.answers.items())
            ],
            usage=self.usage(),
            timings=self.timings,
            attributions=self.attributions,
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Logprobs:
        return Logprobs(content=self.token_logprobs(tokens))
