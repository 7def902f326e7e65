"""Drives an engine: jobs in, text deltas out. Not thread-safe: a lock or one thread owns it."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine import Engine, Request, TokenConstraint, Usage
from ..options import MAX_NEW_TOKENS, Options
from ..processing import Tokenizer
from ..prompt import Prompt
from . import orders
from .detokenize import Answer, AnswerBuilder, AnswerDelta

Order = tuple[int, ...]
MAX_PREFILL_DELAY = 0.2
"""Seconds of prefill between two decode steps, as `Engine.step`."""


@dataclass(slots=True, eq=False)
class GenerationJob:
    """`options.n` answers to one prompt, or one over `options.orders`.

    index: of the first answer, in its deltas. salt: jobs of equal salt share caches.
    constraints: one per answer (and order), for structured output; or none.
    prefill_only: compute the prompt into the prefix cache; its one answer has no text.
    client, weight: as `Engine.add`.
    """

    prompt: Prompt
    options: Options
    index: int = 0
    salt: bytes = b""
    constraints: Sequence[TokenConstraint] = ()
    prefill_only: bool = False
    client: str = ""
    weight: float = 1.0
    running: dict[Request, AnswerBuilder] = field(default_factory=dict)
    orders: list[Order] = field(default_factory=list)
    order_of: dict[Request, Order] = field(default_factory=dict)
    finished: dict[Order, Answer] = field(default_factory=dict)
    items: deque[AnswerDelta | Exception] = field(default_factory=deque)


class FairLock:
    """A lock that a thread which releases it cannot take again before one that waits for it."""

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class EngineDriver:
    """Adds jobs to an engine and turns its events into their deltas.

    max_new_tokens: of an answer whose options do not limit it.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> None:
        self.engine, self.tokenizer, self.max_new_tokens = engine, tokenizer, max_new_tokens
        self._jobs: dict[Request, GenerationJob] = {}

    @property
    def jobs(self) -> list[GenerationJob]:
        """The jobs that have not ended."""
        return list(dict.fromkeys(self._jobs.values()))

    def add(self, job: GenerationJob) -> None:
        """Queue all answers of a job, or none of them: errors as `Engine.add`."""
        options = job.options
        context_left = self.engine.model.config.text.context - len(job.prompt)
        prompts = [job.prompt] * options.n
        if options.orders > 1:
            orders.check(job.prompt, self.tokenizer)
            keys = [one.key for one in job.prompt.media]
            job.orders = orders.permutations(keys, options.orders)
            prompts = [orders.reordered(job.prompt, order) for order in job.orders]
            options = options.but({"logprobs": options.logprobs or 0})
        try:
            for number, prompt in enumerate(prompts):
                answer = 0 if job.orders else number
                request = self.engine.add(
                    prompt,
                    options.sampling(answer, context_left, self.max_new_tokens),
                    salt=job.salt,
                    constraint=job.constraints[number] if job.constraints else None,
                    adapter=options.adapter,
                    prefill_only=job.prefill_only,
                    client=job.client,
                    weight=job.weight,
                )
                self._jobs[request] = job
                job.running[request] = AnswerBuilder(self.tokenizer, options, job.index + answer)
                if job.orders:
                    job.order_of[request] = job.orders[number]
        except BaseException:
            self.abort(job)
            raise

    def abort(self, job: GenerationJob) -> None:
        """End the answers of a job that are still running, and free their memory."""
        for request in job.running:
            self._jobs.pop(request, None)
            self.engine.abort(request)
        job.running.clear()

    def step(
        self, prefill_time_budget: float = math.inf
    ) -> list[tuple[GenerationJob, AnswerDelta | Exception]]:
        """Compute a step; the new deltas by job, or the error that ended a job.

        prefill_time_budget, and exceptions: as `Engine.step`.
        """
        items: list[tuple[GenerationJob, AnswerDelta | Exception]] = []
        for event in self.engine.step(prefill_time_budget):
            request = event.request
            job = self._jobs.get(request)
            if job is None:
                continue
            try:
                if event.error is not None:
                    raise event.error
                delta = job.running[request].push(event)
            except Exception as error:  # noqa: BLE001  an error of one job must not end the others
                self.abort(job)
                items.append((job, error))
                continue
            if delta is None:
                continue
            if delta.answer is not None:
                del self._jobs[request], job.running[request]
                self.engine.abort(request)  # which goes on after a stop string
                if job.orders:
                    job.finished[job.order_of[request]] = delta.answer
            if not job.orders:
                items.append((job, delta))
            elif not job.running and job.finished.keys() == set(job.orders):
                items.append((job, self._over_orders(job)))
        return items

    def _over_orders(self, job: GenerationJob) -> AnswerDelta:
        """The answer of a job whose orders have all ended."""
        question = orders.question_of(job.prompt, self.tokenizer)
        answers = [job.finished[order] for order in job.orders]
        found = [
            orders.OrderedAnswer(
                tuple(index + 1 for index in order),
                orders.as_given(answer.text, order, question),
                sum(token.logprob for token in answer.logprobs or ()),
                answer.usage.generated,
            )
            for order, answer in zip(job.orders, answers, strict=True)
        ]
        best = orders.best(found)
        counts = zip(*(dataclasses.astuple(answer.usage) for answer in answers), strict=True)
        logprobs = answers[best].logprobs if job.options.logprobs is not None else None
        answer = dataclasses.replace(
            answers[best],
            text=found[best].text,
            logprobs=logprobs,
            orders=tuple(found),
            usage=Usage(*map(sum, counts)),
            timings=max((one.timings for one in answers), key=lambda timings: timings.total),
        )
        return AnswerDelta(answer.text, job.index, logprobs or (), answer)
