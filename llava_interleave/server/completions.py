"""Text completions in OpenAI's form: answers to raw prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence

from ..chat import AnswerDelta, TokenLogprob
from .answer_stream import AnswerStream, finish_reason, sse_event, stop_reason
from .openai_types import CompletionChoice, CompletionLogprobs, TextCompletion, Usage


class TextCompletionStream(AnswerStream):
    """POST /v1/completions."""

    prefix = "cmpl-"

    async def __aiter__(self) -> AsyncIterator[list[bytes]]:
        options = self.prepared.request.stream_options
        offsets: Counter[int] = Counter()
        async for deltas in self.deltas():
            yield await self.written(
                lambda deltas: [self._chunk(delta, offsets) for delta in deltas], deltas
            )
        if options is not None and options.include_usage:
            yield [sse_event(self._completion([], self.usage()))]

    def _chunk(self, delta: AnswerDelta, offsets: Counter[int]) -> bytes:
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.logprobs, offsets[delta.index]),
        )
        if choice.logprobs:
            offsets[delta.index] += sum(map(len, choice.logprobs.tokens))
        if delta.answer is not None:
            choice.finish_reason = finish_reason(delta.answer)
            choice.stop_reason = stop_reason(delta.answer)
        return sse_event(self._completion([choice]))

    def body(self) -> TextCompletion:
        """The whole response body."""
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._logprobs(answer.logprobs, 0),
                finish_reason=finish_reason(answer),
                stop_reason=stop_reason(answer),
            )
            for index, answer in sorted(self.answers.items())
        ]
        whole = self._completion(choices, self.usage())
        whole.timings = self.timings
        return whole

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> TextCompletion:
        return TextCompletion(
            id=self.id,
            created=self.prepared.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(
        self, tokens: Sequence[TokenLogprob] | None, offset: int
    ) -> CompletionLogprobs | None:
        """offset: characters of the answer's tokens before these."""
        if not tokens:
            return None
        given, offsets = self.token_logprobs(tokens), []
        for one in given:
            offsets.append(offset)
            offset += len(one.token)
        return CompletionLogprobs(
            tokens=[one.token for one in given],
            token_logprobs=[one.logprob for one in given],
            top_logprobs=[{top.token: top.logprob for top in one.top_logprobs} for one in given]
            if self.prepared.options.logprobs
            else None,
            text_offset=offsets,
        )
