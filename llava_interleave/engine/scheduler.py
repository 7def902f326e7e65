"""Who computes what in a step, within tokens, crops and KV memory. Owns no tensor and knows no network."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from .prefix_cache import HASH_BLOCK, CacheKey, EncoderCache, PrefixCache, SequenceKV
from .request import EncoderInput, Event, FinishReason, Request
from .sampler import Pick

DECODE_RESERVE = 256
"""Tokens of an answer that a sequence gets room for at a time, memory permitting."""

WORTH_WAITING = 4 * HASH_BLOCK
"""A request waits while another one computes a prefix of so many tokens that both have; a system prompt alone is shorter."""

WORTH_KEEPING = 16
"""A cache is copied if more than one of so many tokens would be lost. Copying this many takes as long as computing one again:
10 to 30 on two cores with the 0.5B network, most of it for the new memory."""

SHARED = 16
"""Tokens that answers compute in a step, guesses included: up to about so many share the reading of the weights."""

MIN_CHUNK_SIZE = 64
"""Tokens of a prompt that are read at a time beside answers, however slow the network is."""


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """Tokens `start` to `stop` of a request, after `copied` tokens of `source` were copied to its beginning.

    No tokens: the copy is all.

    sample: its last token is the last there is, so that the next one is to be chosen. encodes: waits for the step's tower call.
    guesses: the last tokens up to `stop`, which the request does not have yet.
    """

    request: Request
    kv: SequenceKV
    start: int
    stop: int
    sample: bool
    encodes: bool = False
    source: SequenceKV | None = None
    copied: int = 0
    guesses: Sequence[int] = ()

    @property
    def asked(self) -> int:
        """After how many of its last tokens the next one is to be chosen."""
        return 1 + len(self.guesses) if self.sample else 0


@dataclass(slots=True, eq=False)
class SchedulerOutput:
    """One step: `encode` these units, then run `work` as one flat batch. decodes: tokens of works that write on an answer."""

    work: list[ScheduledRequest] = field(default_factory=list)
    encode: dict[tuple[bytes, int], EncoderInput] = field(default_factory=dict)
    crops: int = 0
    decodes: int = 0


@dataclass(slots=True)
class StepTimeModel:
    """Seconds that the parts of a step took last, so that prompts can be read in pieces for which answers do not wait long.

    decode: of a step without prompts. token, crop: what each of a prompt added to one. owed: what answers have waited for
    prompts and not yet had for themselves.
    """

    decode: float = 0.0
    token: float = 0.0
    crop: float = 0.0
    owed: float = 0.0

    def learn(self, plan: SchedulerOutput, seconds: float, tower: float) -> None:
        """From what a step took, and the tower's part of it."""
        tokens = sum(work.stop - work.start for work in plan.work) - plan.decodes
        if not tokens:
            self.decode, self.owed = seconds, max(0.0, self.owed - seconds)
            return
        reading = max(0.0, seconds - tower - self.decode)
        self.token = reading / tokens
        if plan.crops:
            self.crop = tower / plan.crops
        self.owed = tower + reading if plan.decodes else 0.0

    def most(self, prefill_time_budget: float, tokens: int, crops: int) -> tuple[int, int]:
        """Tokens of prompts and crops for a step beside answers that wait for `prefill_time_budget` seconds; at least some, or none now."""
        if self.owed:
            return 0, 0
        piece = (
            max(MIN_CHUNK_SIZE, int(prefill_time_budget / self.token))
            if self.token
            else MIN_CHUNK_SIZE
        )
        several = max(1, int(prefill_time_budget / self.crop)) if self.crop else 1
        return min(tokens, piece), min(crops, several)


class Scheduler:
    """Decodes first, then prefills in order of arrival with the tokens that are left, then requests that wait.

    KV memory is given as it is needed. Where none is left, caches go first; then the request that started last is pre-empted: it
    waits at the front, computes its tokens again, and nobody starts until some other has ended.

    piece: with a number, prompts are computed in pieces of so many tokens from their beginning, of which a step has whole ones
    only, a prefix is used as far as it was computed so, and what was written before a pre-emption is computed again one by one:
    how a request's tokens are cut does not depend on others then. 0: they are cut as it fits.
    """

    def __init__(
        self,
        prefixes: PrefixCache,
        features: EncoderCache,
        *,
        max_num_batched_tokens: int,
        max_batched_images: int,
        max_num_seqs: int,
        piece: int = 0,
    ) -> None:
        self.prefixes, self.features, self.piece = prefixes, features, piece
        self.max_num_batched_tokens, self.max_batched_images, self.max_num_seqs = (
            max_num_batched_tokens,
            max_batched_images,
            max_num_seqs,
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.full = False
        self.pace = StepTimeModel()

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self, prefill_time_budget: float = math.inf) -> SchedulerOutput:
        """The next step; empty only if there is nothing to do. prefill_time_budget: as `Engine.step`."""
        plan, running, index = SchedulerOutput(), self.running, 0
        self.prefixes.pinned.clear()
        while index < len(running):
            request = running[index]
            index += 1
            kv = request.kv
            assert kv is not None
            start, stop = kv.length, len(request.tokens)
            decodes = stop - start == 1 and request.first_unit == len(request.units)
            if decodes and (stop <= kv.capacity or self._grow(request, kv)):
                plan.work.append(ScheduledRequest(request, kv, start, stop, True))
        planned = (
            {id(work.request) for work in plan.work} if len(plan.work) < len(running) else None
        )
        self._guess(plan)
        plan.decodes = sum(work.stop - work.start for work in plan.work)
        budget, most_crops = self.max_num_batched_tokens - plan.decodes, self.max_batched_images
        if plan.decodes and prefill_time_budget < math.inf and not self.piece:
            budget, most_crops = self.pace.most(prefill_time_budget, budget, most_crops)
        if planned is not None:
            for request in running:
                if id(request) not in planned and budget:
                    budget -= self._prefill(request, plan, budget, most_crops)
        if self.waiting and budget:
            self._admit(plan, budget, most_crops)
        assert plan.work or not (running or self.waiting)
        plan.work.sort(
            key=lambda work: work.request.adapter
        )  # so that each adapter's rows lie together
        return plan

    def _guess(self, plan: SchedulerOutput) -> None:
        """Let answers be written several tokens at a time where they repeat what was said, as long as they are few."""
        most = min(SHARED, self.max_num_batched_tokens) // max(1, len(plan.work)) - 1
        for work in plan.work if most else ():
            if (lookup := work.request.lookup) is not None:
                room = min(most, work.kv.capacity - work.stop, work.request.most - work.stop)
                work.guesses = lookup.guess(work.request.tokens, room)
                work.stop += len(work.guesses)

    def _grow(self, request: Request, kv: SequenceKV) -> bool:
        """More room for a sequence that decodes; others are pre-empted for it, or else it is itself."""
        length = len(request.tokens)
        while True:
            for more in (max(DECODE_RESERVE, length // 4), HASH_BLOCK):
                if self.prefixes.reserve(kv, min(length + more, request.most)):
                    return True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False

    def _preempt(self, request: Request) -> None:
        assert len(self.running) > 1, "a request alone always fits: the engine refuses others"
        self._leave(request)
        self.waiting.appendleft(request)
        self.full = True

    def _leave(self, request: Request) -> None:
        """Give back all that a running request holds."""
        self.running.remove(request)
        self._release(request)
        assert request.kv is not None
        self.prefixes.drop(request.kv)
        request.kv = None

    def _release(self, request: Request) -> None:
        for unit in request.units[request.first_unit : request.held_unit]:
            self.features.release(unit.key)
        request.first_unit = request.held_unit = 0

    def _prefill(
        self, request: Request, plan: SchedulerOutput, budget: int, most_crops: int
    ) -> int:
        """Plan the next tokens of a prompt, as far as images are encoded or can be in this step; how many it were."""
        kv = request.kv
        assert kv is not None
        start = kv.length
        stop = self._cut(request, start) if self.piece else min(len(request.tokens), start + budget)
        if stop - start > budget:
            return 0
        encodes = False
        for unit in islice(request.units, request.first_unit, None):
            if unit.start >= stop:
                break
            if unit.key not in self.features and unit.key not in plan.encode:
                crops = len(unit.pixels)
                if plan.crops and plan.crops + crops > most_crops and not self.piece:
                    stop = unit.start
                    break
                plan.encode[unit.key] = unit
                plan.crops += crops
            encodes |= unit.key in plan.encode
        if stop <= start:
            return 0
        while (
            request.held_unit < len(request.units) and request.units[request.held_unit].start < stop
        ):
            self.features.hold(request.units[request.held_unit].key)
            request.held_unit += 1
        plan.work.append(
            ScheduledRequest(request, kv, start, stop, stop == len(request.tokens), encodes)
        )
        return stop - start

    def _cut(self, request: Request, start: int) -> int:
        """Where the piece that begins at `start` ends."""
        prompt = len(request.prompt.tokens)
        return min(prompt, (start // self.piece + 1) * self.piece) if start < prompt else start + 1

    def _admit(self, plan: SchedulerOutput, budget: int, most_crops: int) -> None:
        """Start waiting requests in order of arrival, while there is room and something left of the step.

        Only a request whose prefix another one is about to compute steps aside: it starts when it can copy it.
        """
        for request in list(islice(self.waiting, self.max_num_seqs)):
            if not budget or len(self.running) >= self.max_num_seqs or (self.full and self.running):
                return
            match = self.prefixes.find(request.keys, len(request.tokens) - 1)
            if match.coming >= WORTH_WAITING and match.coming - match.usable >= HASH_BLOCK:
                continue
            copied = match.usable if match.usable >= HASH_BLOCK else 0
            if self.piece and match.source is not None:
                copied = min(copied, match.source.whole) // self.piece * self.piece
            source = match.source if copied else None
            kv = self._room(request, source, copied)
            if kv is None:
                return
            copied = kv.length
            self.waiting.remove(request)
            self.running.append(request)
            self.full = False
            request.kv, kv.whole = kv, copied
            while (
                request.first_unit < len(request.units)
                and request.units[request.first_unit].stop <= copied
            ):
                request.first_unit += 1
            request.held_unit = request.first_unit
            if request.cached is None:
                request.cached = copied
            used = self._prefill(request, plan, budget, most_crops)
            if source is not None and source is not kv and copied > self.prefixes.shared(copied):
                if not used:
                    plan.work.append(ScheduledRequest(request, kv, copied, copied, False))
                plan.work[-1].source, plan.work[-1].copied = source, copied
            budget -= used

    def _room(self, request: Request, source: SequenceKV | None, copied: int) -> SequenceKV | None:
        """Room for a request that starts with `copied` tokens of `source`; None: there is none now.

        A cache that ends soon after the request leaves it is taken over, and so is one that there is no memory to copy.
        """
        prefixes, length = self.prefixes, len(request.tokens)
        keys = request.keys.through(request.tokens[len(request.keys.numbers) :], length)
        sizes = [min(length + more, request.most) for more in (DECODE_RESERVE, HASH_BLOCK)]
        if prefixes.pages and source is not None:
            return self._branch(keys, source, copied, sizes)
        idle = source if source is not None and not source.running else None
        if idle is None or idle.length - copied > max(HASH_BLOCK, copied // WORTH_KEEPING):
            if idle is not None:
                prefixes.pinned.add(idle)
            for size in sizes:
                kv = SequenceKV(keys, copied)
                if prefixes.reserve(kv, size):
                    prefixes.start(kv)
                    if idle is not None:
                        prefixes.idle.move_to_end(idle)
                    return kv
        if idle is not None:
            for size in sizes:
                if prefixes.reserve(idle, max(size, idle.capacity)):
                    prefixes.take(idle, keys, copied)
                    return idle
        return None

    def _branch(
        self, keys: CacheKey, source: SequenceKV, copied: int, sizes: list[int]
    ) -> SequenceKV | None:
        """A sequence that has the whole blocks of `copied` tokens with `source`, and a copy of the rest. Where there is no memory
        for that beside `source`, the rest is computed again."""
        prefixes, whole = self.prefixes, self.prefixes.shared(copied)
        for length in dict.fromkeys((copied, 0 if self.piece and whole % self.piece else whole)):
            kv = SequenceKV(keys, length)
            prefixes.share(kv, source, length)
            pins = {source} - prefixes.pinned if length > whole else set()
            prefixes.pinned |= pins
            if any(prefixes.reserve(kv, size) for size in sizes):
                prefixes.start(kv)
                if source in prefixes.idle:
                    prefixes.idle.move_to_end(source)
                return kv
            prefixes.release(kv)
            prefixes.pinned -= pins
        return None

    def commit(
        self,
        plan: SchedulerOutput,
        picks: Sequence[Sequence[Pick]],
        eos_ids: frozenset[int],
        now: float,
    ) -> list[Event]:
        """Write down what a step computed; its events. picks: of each work that samples, its right guesses and one token more."""
        events, chosen = [], iter(picks)
        for work in plan.work:
            request = work.request
            work.kv.length = work.stop
            if self.piece and work.start == work.kv.whole and work.stop % self.piece == 0:
                work.kv.whole = work.stop
            while (
                request.first_unit < request.held_unit
                and request.units[request.first_unit].stop <= work.stop
            ):
                self.features.release(request.units[request.first_unit].key)
                request.first_unit += 1
            if not work.sample:
                continue
            found = next(chosen)
            work.kv.length -= len(work.guesses)
            if request.first_token is None:
                request.first_token = now
            if request.lookup is not None and work.guesses:
                request.lookup.learn(len(work.guesses), len(found) - 1)
                request.drafted += len(work.guesses)
            for number, pick in enumerate(found):
                work.kv.length += number > 0
                request.accepted += number > 0
                request.tokens.append(pick.token)
                if (reason := _reason(request, pick.token, eos_ids)) is not None:
                    events.append(self.end(request, reason, now, pick))
                    break
                events.append(Event(request, pick.token, pick.logprob, pick.top))
        return events

    def end(
        self,
        request: Request,
        reason: FinishReason,
        now: float,
        pick: Pick | None = None,
        error: Exception | None = None,
    ) -> Event:
        """Take a request out; what it computed stays as cache unless the reason is an error."""
        kv = request.kv
        if kv is None:
            self.waiting.remove(request)
        elif reason == "error":
            self._leave(request)
        else:
            self.running.remove(request)
            self._release(request)
            self.prefixes.retire(
                kv, request.keys.through(request.tokens[len(request.keys.numbers) :], kv.length)
            )
            request.kv = None
        self.full = False
        request.finish_reason, request.ended, request.sampler = reason, now, None
        token, logprob, top = pick or (None, None, ())
        return Event(
            request, token, logprob, top, reason, request.usage, request.timings(now), error
        )


def _reason(request: Request, token: int, eos_ids: frozenset[int]) -> FinishReason | None:
    """Why a request ends with this token, its last so far; None if it does not."""
    sampling = request.sampling
    if token in sampling.stop_ids or (token in eos_ids and not sampling.ignore_eos):
        return "stop"
    return "length" if len(request.tokens) > request.most else None
