"""Events of the engine become text: no half characters, stop strings, log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..attribution.citations import Citation, mark
from ..engine import Event, Timings, Usage
from ..options import Options
from ..processing import TextStream, Tokenizer
from .orders import OrderedAnswer


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, its natural log-probability, and the most probable tokens with theirs.

    allowed_logprob: of all tokens together that structured output allowed; 0 where it was free.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]
    allowed_logprob: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `str(answer)` is its text.

    tokens: every generated id, including one that ended the answer.
    finish_reason: "stop" at the end of the turn or a stop string, "length" at max_new_tokens,
    "repetition" if it only repeated itself (`Options.stop_on_repetition`).
    citations: of its sentences, with the option `cite`.
    orders: the answers to all orders of the images, with the option `orders`; this is the most
    probable one on average. Its text has the images numbered as they were given, its tokens as the
    model saw them; its usage is that of all orders.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    citations: tuple[Citation, ...] | None = None
    orders: tuple[OrderedAnswer, ...] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def cited(self) -> str:
        """Its text with the numbers of the cited images behind each sentence."""
        return mark(self.text, self.citations or ())


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """The next part of an answer while it is generated.

    text: the new text; the texts of all deltas together are the answer's text.
    index: which of `n` answers.
    logprobs: of the new tokens, if the options ask for log-probabilities.
    answer: the whole answer in its last delta, None before.
    """

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    answer: Answer | None = None

    def __add__(self, later: AnswerDelta) -> AnswerDelta:
        """Two consecutive deltas of one answer as one."""
        logprobs = self.logprobs + later.logprobs
        return AnswerDelta(self.text + later.text, self.index, logprobs, later.answer)


class StopStrings:
    """Passes text through until the first complete stop string; never shows a part of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self.stops = list(stops)
        self.pending = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now safe to show. After a stop string, `stopped` is True."""
        assert not self.stopped
        self.pending += text
        matches = [
            (start + len(stop), start)
            for stop in self.stops
            if (start := self.pending.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            shown, self.pending = self.pending[: min(matches)[1]], ""
            return shown
        cut = len(self.pending) - max((self._partial(stop) for stop in self.stops), default=0)
        shown, self.pending = self.pending[:cut], self.pending[cut:]
        return shown

    def finish(self) -> str:
        """The text held back as a possible beginning of a stop string."""
        shown, self.pending = self.pending, ""
        return shown

    def _partial(self, stop: str) -> int:
        """The length of the longest beginning of `stop` that the pending text ends with."""
        longest = min(len(stop) - 1, len(self.pending))
        return next((n for n in range(longest, 0, -1) if self.pending.endswith(stop[:n])), 0)


class AnswerBuilder:
    """Builds one answer from the events of its request."""

    def __init__(self, tokenizer: Tokenizer, options: Options, index: int) -> None:
        self.tokenizer, self.index = tokenizer, index
        self.stream = TextStream(tokenizer)
        self.stops = StopStrings(options.stop)
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if options.logprobs is None else []

    def push(self, event: Event) -> AnswerDelta | None:
        """The delta of an event, None if it shows nothing yet. After one with `answer`, no more."""
        ended = event.finish_reason is not None
        text, logprobs = "", []
        if event.token is not None:
            self.tokens.append(event.token)
            if event.finish_reason != "stop":  # else the token ends the answer: it has no text
                text = self.stops.push(self.stream.push(event.token))
            if self.logprobs is not None and event.logprob is not None:
                name = self.tokenizer.decode([event.token], skip_special=False)
                logprob = TokenLogprob(
                    event.token, name, event.logprob, event.top_logprobs, event.allowed_logprob
                )
                self.logprobs.append(logprob)
                logprobs = [logprob] * (event.finish_reason != "stop")
        if ended and not self.stops.stopped:
            text += self.stops.push(self.stream.finish())
            if not self.stops.stopped:
                text += self.stops.finish()
        self.text += text
        if ended or self.stops.stopped:
            return AnswerDelta(text, self.index, tuple(logprobs), self._answer(event))
        return AnswerDelta(text, self.index, tuple(logprobs)) if text or logprobs else None

    def _answer(self, event: Event) -> Answer:
        reason = "stop" if self.stops.stopped else str(event.finish_reason)
        # without tokens that the same step generated after a stop string
        usage = dataclasses.replace(event.request.usage, generated=len(self.tokens))
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        timings = event.request.timings(0.0)
        return Answer(self.text, tuple(self.tokens), reason, usage, timings, logprobs)
