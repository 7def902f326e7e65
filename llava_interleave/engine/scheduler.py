"""Schedules each step within limits of tokens, images and KV memory. Owns no tensor or model."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from .encoder_cache import EncoderCache
from .prefix_cache import HASH_BLOCK, CacheKey, PrefixCache, SequenceKV
from .repetition import ends_in_loop
from .request import EncoderInput, Event, FinishReason, Request
from .sampler import Pick
from .virtual_tokens import SavedTime, VirtualTokenCounters

DECODE_RESERVE = 256
"""Tokens of an answer that KV memory is allocated for at a time, if there is enough."""

MIN_PENDING_PREFIX = 4 * HASH_BLOCK
"""A request waits while another one prefills a common prefix of at least so many tokens; a system
prompt alone is shorter."""

COPY_SPEEDUP = 16
"""Tokens that are copied in the time that one is computed. Measured: 10 to 30 on two cores with the
0.5B model, most of it for new memory. A cache is copied, not reused, if it would lose more than one
token per so many copied."""

MAX_DRAFTING_TOKENS = 16
"""Decode tokens of a step, with draft tokens: up to about so many share one read of the weights."""

MIN_CHUNK_SIZE = 64
"""Prompt tokens per step next to running answers, however slow the model is."""

PREFILL_STEPS, MIN_PREFILL_SECONDS = 10, 0.01
"""Prompts delay answers by about so many decode steps at a time, or by a budget if that is less: a
fast model's short answers would otherwise wait as long as those of a slow one."""

DECODE_COST = 2
"""Prompt tokens that a generated token counts as between clients, as in the VTC paper."""

SAVED_SECONDS, SAVED_STEPS = 5.0, 256
"""How much time without requests a client saves up at most, to be preferred later: so many
seconds, or so many steps of decodes where these take longer."""
SHARED_EVERY, PREFERRED_SLOWDOWN = 16, 1.1
"""Every so many steps are shared even so; the others may take so many times as long as without
other clients."""

MAX_SLOWER = 1.25
"""How many times as long as the steps of its size before a step may seem to take."""

MEASURED_EVERY, PROBED_EVERY = 256, 16
"""Steps between two measurements of how fast a client's answers would be without other clients, and
of a step with one answer more than seems right: one slow step is no reason for ever."""


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """Tokens `start` to `stop` of a request, after `copied` tokens of `source` are copied to its
    KV.

    Without tokens only the copy is done. sample: `stop` is the end, so the next token is sampled.
    needs_encoder: an encoder input of this step belongs to it. draft_tokens: the last tokens up to
    `stop`, which the request does not have yet.
    """

    request: Request
    kv: SequenceKV
    start: int
    stop: int
    sample: bool
    needs_encoder: bool = False
    source: SequenceKV | None = None
    copied: int = 0
    draft_tokens: Sequence[int] = ()

    @property
    def num_logits(self) -> int:
        """The number of its last tokens whose logits are needed."""
        return 1 + len(self.draft_tokens) if self.sample else 0


@dataclass(slots=True, eq=False)
class SchedulerOutput:
    """One step: encode `encoder_inputs`, then compute `scheduled` as one flat batch.

    crops: of the encoder inputs. decode_tokens: tokens of running answers, draft tokens included.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    encoder_inputs: dict[tuple[bytes, int], EncoderInput] = field(default_factory=dict)
    crops: int = 0
    decode_tokens: int = 0


@dataclass(slots=True)
class StepTimeModel:
    """Seconds of the parts of the last steps, to size prefill chunks by the time they take.

    decode: a step without prompts. token, crop: what each of a prompt adds. owed: seconds that
    answers have waited for prompts and not yet had for themselves. decodes: a step without prompts,
    by its number of requests.
    """

    decode: float = 0.0
    token: float = 0.0
    crop: float = 0.0
    owed: float = 0.0
    decodes: dict[int, float] = field(default_factory=dict)

    def update(self, output: SchedulerOutput, seconds: float, encode_seconds: float) -> None:
        """Learn from a step that took `seconds`, of which `encode_seconds` in the encoder."""
        tokens = sum(one.stop - one.start for one in output.scheduled) - output.decode_tokens
        if not tokens:
            self.decode, self.owed = seconds, max(0.0, self.owed - seconds)
            if (size := len(output.scheduled)) == output.decode_tokens:  # no draft tokens
                # A thread that waited for a core or for the interpreter is no slower step.
                last = self.decodes.get(size, seconds)
                self.decodes[size] = (last + min(seconds, MAX_SLOWER * last)) / 2
            return
        prefill = max(0.0, seconds - encode_seconds - self.decode)
        if tokens >= MIN_CHUNK_SIZE or not self.token:
            # Tokens far into a prompt take longer than those at its beginning.
            measured = prefill / tokens
            self.token = max(measured, (self.token + measured) / 2)
        if output.crops:
            self.crop = encode_seconds / output.crops
        self.owed = encode_seconds + prefill if output.decode_tokens else 0.0

    def max_decodes(self, clients: float, fewest: int, wanted: int) -> int:
        """How many of `wanted` decodes of several clients a step has.

        It takes at most `clients` times as long as the decodes of the client that has the `fewest`
        would alone. A size whose time is not known is tried.
        """
        if fewest not in self.decodes:
            return fewest
        limit, size = clients * self.decodes[fewest], fewest
        for larger, seconds in sorted(self.decodes.items()):
            if larger > size and seconds > limit:
                part = (limit - self.decodes[size]) / (seconds - self.decodes[size])
                return min(wanted, size + int(part * (larger - size)))
            size = max(size, larger)
        return wanted

    def limits(self, budget: float, tokens: int, crops: int) -> tuple[int, int]:
        """Prompt tokens and crops for a step that may delay answers by `budget` seconds.

        At most `tokens` and `crops`; at least some, or none at all in this step.
        """
        return (0, 0) if self.owed else self.short_chunk(budget, tokens, crops)

    def short_chunk(self, budget: float, tokens: int, crops: int) -> tuple[int, int]:
        """As `chunk`, for what takes no longer than a few decode steps either."""
        delay = max(MIN_PREFILL_SECONDS, PREFILL_STEPS * self.decode)
        return self.chunk(min(budget, delay), tokens, crops)

    def chunk(self, budget: float, tokens: int, crops: int) -> tuple[int, int]:
        """Prompt tokens and crops that take about `budget` seconds; at most `tokens` and
        `crops`.
        """
        fit = int(budget / self.token) if self.token else 0
        fit_crops = int(budget / self.crop) if self.crop else 0
        return min(tokens, max(MIN_CHUNK_SIZE, fit)), min(crops, max(1, fit_crops))


class WaitingQueue:
    """Waiting requests, those of each client in order of arrival."""

    def __init__(self) -> None:
        self.by_client: dict[str, deque[Request]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.by_client.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for queue in self.by_client.values() for request in queue)

    def append(self, request: Request) -> None:
        self.by_client.setdefault(request.client, deque()).append(request)

    def appendleft(self, request: Request) -> None:
        self.by_client.setdefault(request.client, deque()).appendleft(request)

    def remove(self, request: Request) -> None:
        queue = self.by_client[request.client]
        queue.remove(request)
        if not queue:
            del self.by_client[request.client]


class Scheduler:
    """Decodes first, then continues prefills in order of arrival, then starts waiting requests.

    KV memory is allocated as it is needed. If there is none left, cached sequences are evicted
    first, then the request that started last of the client with most memory is preempted, also to
    start one of a client that has less than it. It waits in front and computes its tokens again.
    Until another one of its client has ended, none of that client starts; if it has none running,
    one starts whose whole answer has room.

    Clients are served fairly by virtual token counters: prompts of the client that has had least
    come first. Where more answers in a step take more time, a client with few answers does not wait
    for all answers of the others: they take turns.

    Requests with `prefill_only` run one at a time while there is no other. When another one
    arrives, their tokens so far become a cached prefix, and they wait again: they delay it by the
    rest of a step, and take no memory that it needs.

    chunk_size: if not 0, prompts are computed in chunks of so many tokens from their beginning, a
    step has whole chunks only, a cached prefix is used as far as it was computed in whole chunks,
    and the answer of a preempted request is computed again token by token: the shapes of a
    request's computations then do not depend on other requests.
    """

    def __init__(
        self,
        prefix_cache: PrefixCache,
        encoder_cache: EncoderCache,
        *,
        max_num_batched_tokens: int,
        max_batched_images: int,
        max_num_seqs: int,
        chunk_size: int = 0,
    ) -> None:
        self.prefix_cache, self.encoder_cache = prefix_cache, encoder_cache
        self.chunk_size = chunk_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_batched_images = max_batched_images
        self.max_num_seqs = max_num_seqs
        self.waiting = WaitingQueue()
        self.waiting_prefills = WaitingQueue()
        self.running: list[Request] = []
        self.preempted_clients: set[str] = set()  # since a request of theirs ended
        self.step_times = StepTimeModel()
        self.virtual_tokens = VirtualTokenCounters()
        self.decoded_tokens = VirtualTokenCounters()  # a long prompt does not delay its answer
        self._steps = 0
        self.saved_time = SavedTime(SAVED_SECONDS)
        self._preferred: set[str] = set()  # clients in this step
        self._starved: Request | None = None  # one that the last step had no room for

    def add(self, request: Request) -> None:
        for counters in (self.virtual_tokens, self.decoded_tokens):
            counters.enter(request.client)
        self.saved_time.enter(request.client, request.weight, request.added)
        self._queue(request).append(request)

    def _queue(self, request: Request) -> WaitingQueue:
        return self.waiting_prefills if request.prefill_only else self.waiting

    @property
    def busy(self) -> bool:
        """Whether there is anything to schedule."""
        return bool(self.running or self.waiting or self.waiting_prefills)

    def schedule(self, prefill_time_budget: float = math.inf) -> SchedulerOutput:
        """The next step; empty only if there is nothing to do. The budget: as `Engine.step`."""
        output = SchedulerOutput()
        self._steps += 1
        self.prefix_cache.pinned.clear()
        if self.waiting:
            for request in [request for request in self.running if request.prefill_only]:
                self._retire(request)
                self.waiting_prefills.appendleft(request)
        self._make_room()
        preferred = self.saved_time.preferred()
        self._preferred = preferred if self._steps % SHARED_EVERY else set()
        decoding, limit = self._decodes()
        if self._preferred and not limit:
            self._schedule_prompts(output, prefill_time_budget)
            if output.scheduled:
                return output
            self._preferred = set()  # its request found no memory
            decoding, limit = self._decodes()
        for request in decoding:
            if len(output.scheduled) == limit:
                break
            if (kv := request.kv) is None:  # preempted for one before it
                continue
            start, stop = kv.length, len(request.tokens)
            if stop <= kv.capacity or self._grow(request, kv, output):
                output.scheduled.append(ScheduledRequest(request, kv, start, stop, True))
                request.last_decode = self._steps
                self._charge(request, DECODE_COST)
                self.decoded_tokens.charge(request.client, 1 / request.weight)
        self._draft(output)
        output.decode_tokens = sum(one.stop - one.start for one in output.scheduled)
        self._schedule_prompts(output, prefill_time_budget)
        assert output.scheduled or not self.busy
        return output

    def _prompt_limits(
        self, output: SchedulerOutput, prefill_time_budget: float
    ) -> tuple[int, int]:
        """The prompt tokens and crops of a step next to its decodes."""
        budget = self.max_num_batched_tokens - output.decode_tokens
        max_crops = self.max_batched_images
        if prefill_time_budget < math.inf and not self.chunk_size:
            if output.decode_tokens:
                budget, max_crops = self.step_times.limits(prefill_time_budget, budget, max_crops)
            elif self.virtual_tokens.several:  # another client's prompt may come during the step
                budget, max_crops = self.step_times.short_chunk(
                    prefill_time_budget, budget, max_crops
                )
            elif not self.waiting and all(request.prefill_only for request in self.running):
                budget, max_crops = self.step_times.chunk(prefill_time_budget, budget, max_crops)
        return budget, max_crops

    def _make_room(self) -> None:
        """Preempt a request for one that found no room.

        It is one of a client that has several, and that keeps at least as much (memory, or places
        where these are full) as the other client gets; at least one, where that has none running.
        """
        starved, self._starved = self._starved, None
        if starved is None or starved not in self.waiting:
            return
        client, running = starved.client, Counter(request.client for request in self.running)
        others = [one for one in self.running if one.client != client and running[one.client] > 1]
        if not others:
            return
        victim = self._largest(others)
        assert victim.kv is not None
        if len(self.running) >= self.max_num_seqs:
            fair = running[client] + 1 < running[victim.client]
        else:
            wanted = self._kv_tokens(client) + len(starved.tokens) / starved.weight
            left = self._kv_tokens(victim.client) - victim.kv.length / victim.weight
            fair = wanted <= left
        if fair or not running[client]:
            self._preempt(victim)

    def _largest(self, requests: Iterable[Request]) -> Request:
        """Whom to preempt of these running requests: the last to start of the client that has most
        tokens in KV memory for its weight.

        Not of the client that was computed most for: that may be one with a short answer, whose
        memory is no help to one with many.
        """
        last = {request.client: request for request in requests}
        return max(last.values(), key=lambda request: self._kv_tokens(request.client))

    def _kv_tokens(self, client: str) -> float:
        """Tokens in KV memory of a client's running requests, divided by its weight."""
        running = ((one.kv, one.weight) for one in self.running if one.client == client)
        return sum(kv.length / weight for kv, weight in running if kv is not None)

    def _decodes(self) -> tuple[list[Request], int]:
        """The running requests that could decode in this step, and how many of them will.

        None, where clients that are preferred have nothing but prompts.
        """
        decoding = [request for request in self.running if _decodes(request)]
        if first := sum(request.client in self._preferred for request in decoding):
            decoding.sort(key=lambda request: request.client not in self._preferred)
            most = self.step_times.max_decodes(PREFERRED_SLOWDOWN, first, len(decoding))
            return decoding, most
        prompts = (request.client for request in self.running if not _decodes(request))
        if not self._preferred.isdisjoint((*prompts, *self.waiting.by_client)):
            return [], 0
        sizes = Counter(request.client for request in decoding)
        if len(sizes) < 2:
            return decoding, len(decoding)
        fewest = min(sizes.values())
        limit = self.step_times.max_decodes(len(sizes), fewest, len(decoding))
        limit += self._steps % PROBED_EVERY == 0
        if self._steps % MEASURED_EVERY == 0:
            limit = fewest
        if limit >= len(decoding):
            return decoding, len(decoding)
        turns: Counter[str] = Counter()
        ranks: dict[int, float] = {}
        for request in sorted(decoding, key=lambda one: (one.last_decode, one.num_generated)):
            turn = turns[request.client] / request.weight
            ranks[request.id] = self.decoded_tokens[request.client] + turn
            turns[request.client] += 1
        return sorted(decoding, key=lambda request: ranks[request.id]), limit

    def _schedule_prompts(self, output: SchedulerOutput, prefill_time_budget: float) -> None:
        """Prompt tokens, those of the client that has had least first.

        Where a request has no room, those of clients with as much memory do not start either.
        """
        budget, max_crops = self._prompt_limits(output, prefill_time_budget)
        prefilling: dict[str, list[Request]] = {}
        for request in self.running:
            if not _decodes(request):
                prefilling.setdefault(request.client, []).append(request)
        waiting, most_tokens = self.waiting, math.inf
        if not waiting and not self.running:
            waiting = self.waiting_prefills
        clients = dict.fromkeys((*prefilling, *waiting.by_client))
        for client in sorted(
            clients, key=lambda one: (one not in self._preferred, self.virtual_tokens[one])
        ):
            if self._preferred and output.scheduled and client not in self._preferred:
                continue
            for request in prefilling.get(client, ()):
                if budget:
                    budget -= self._prefill(request, output, budget, max_crops)
            if not budget or client not in waiting.by_client:
                continue
            if (tokens := self._kv_tokens(client)) < most_tokens:
                budget, admitted = self._admit(waiting, client, output, budget, max_crops)
                most_tokens = most_tokens if admitted else tokens
        # rows of one adapter next to each other
        output.scheduled.sort(key=lambda one: one.request.adapter)

    def _charge(self, request: Request, tokens: int) -> None:
        self.virtual_tokens.charge(request.client, tokens / request.weight)

    def _draft(self, output: SchedulerOutput) -> None:
        """Add draft tokens to decodes, as long as there are few and only one client has requests:
        each makes the step longer, also for the others.
        """
        if self.virtual_tokens.num_clients > 1:
            return
        share = min(MAX_DRAFTING_TOKENS, self.max_num_batched_tokens)
        share = share // max(1, len(output.scheduled)) - 1
        for one in output.scheduled if share else ():
            if (drafter := one.request.drafter) is not None:
                free = one.kv.capacity - one.stop
                limit = min(share, free, one.request.max_kv_tokens - one.stop)
                one.draft_tokens = drafter.propose(one.request.tokens, limit)
                one.stop += len(one.draft_tokens)

    def _grow(self, request: Request, kv: SequenceKV, output: SchedulerOutput) -> bool:
        """More KV memory for a decode; other requests are preempted for it, or else it is
        itself.
        """
        length = len(request.tokens)
        while True:
            for more in (max(DECODE_RESERVE, length // 4), HASH_BLOCK):
                if self.prefix_cache.reserve(kv, min(length + more, request.max_kv_tokens)):
                    return True
            victim = self._largest(self.running)
            self._preempt(victim)
            output.scheduled = [one for one in output.scheduled if one.request is not victim]
            if victim is request:
                return False

    def _preempt(self, request: Request) -> None:
        assert len(self.running) > 1, "a single request always fits: the engine rejects others"
        self._free(request)
        self.waiting.appendleft(request)
        self.preempted_clients.add(request.client)

    def _free(self, request: Request) -> None:
        """Free all memory of a running request."""
        self.running.remove(request)
        self._release_features(request)
        assert request.kv is not None
        self.prefix_cache.drop(request.kv)
        request.kv = None

    def _release_features(self, request: Request) -> None:
        for one in request.encoder_inputs[request.first_input : request.held_input]:
            self.encoder_cache.release(one.key)
        request.first_input = request.held_input = 0

    def _prefill(
        self, request: Request, output: SchedulerOutput, budget: int, max_crops: int
    ) -> int:
        """Schedule the next prompt tokens, up to the first image that this step cannot encode.

        Returns the number of tokens.
        """
        kv = request.kv
        assert kv is not None
        start, length = kv.length, len(request.tokens)
        stop = self._chunk_end(request, start) if self.chunk_size else min(length, start + budget)
        if stop - start > budget:
            return 0
        needs_encoder = False
        for one in islice(request.encoder_inputs, request.first_input, None):
            if one.start >= stop:
                break
            if one.key not in self.encoder_cache and one.key not in output.encoder_inputs:
                crops = one.layout.crops
                if output.crops and output.crops + crops > max_crops and not self.chunk_size:
                    stop = one.start
                    break
                output.encoder_inputs[one.key] = one
                output.crops += crops
                self._charge(request, one.stop - one.start)
            needs_encoder |= one.key in output.encoder_inputs
        if stop <= start:
            return 0
        for one in islice(request.encoder_inputs, request.held_input, None):
            if one.start >= stop:
                break
            self.encoder_cache.hold(one.key)
            request.held_input += 1
        sample = stop == length and not request.prefill_only
        one_step = ScheduledRequest(request, kv, start, stop, sample, needs_encoder)
        output.scheduled.append(one_step)
        self._charge(request, stop - start)
        return stop - start

    def _chunk_end(self, request: Request, start: int) -> int:
        """The end of the chunk that begins at `start`."""
        prompt, size = len(request.prompt.tokens), self.chunk_size
        return min(prompt, (start // size + 1) * size) if start < prompt else start + 1

    def _admit(
        self,
        waiting: WaitingQueue,
        client: str,
        output: SchedulerOutput,
        budget: int,
        max_crops: int,
    ) -> tuple[int, bool]:
        """Start a client's waiting requests in order of arrival, while memory and step have room.

        Only a request whose prefix another one is about to compute is skipped: it starts once it
        can copy that prefix. Returns the budget left, and whether others may start.
        """
        for request in list(islice(waiting.by_client[client], self.max_num_seqs)):
            full = len(self.running) >= self.max_num_seqs
            if not budget or full or (request.prefill_only and self.running):
                if full:
                    self._starved = request
                return budget, False
            held_back = client in self.preempted_clients and bool(self.running)
            running = any(one.client == client for one in self.running)
            if held_back and running:
                return budget, True
            match = self.prefix_cache.find(request.cache_key, len(request.tokens) - 1)
            missing = match.pending - match.cached
            if match.pending >= MIN_PENDING_PREFIX and missing >= HASH_BLOCK:
                continue
            copied = match.cached if match.cached >= HASH_BLOCK else 0
            if self.chunk_size and match.source is not None:
                whole = min(copied, match.source.chunked_length)
                copied = whole // self.chunk_size * self.chunk_size
            source = match.source if copied else None
            kv = self._allocate(request, source, copied, whole=held_back)
            if kv is None:
                self._starved = request
                return budget, held_back
            copied = kv.length
            waiting.remove(request)
            self.running.append(request)
            self.preempted_clients.discard(client)
            request.kv, kv.chunked_length = kv, copied
            for one in islice(request.encoder_inputs, request.first_input, None):
                if one.stop > copied:
                    break
                request.first_input += 1
            request.held_input = request.first_input
            if request.cached is None:
                request.cached = copied
            used = self._prefill(request, output, budget, max_crops)
            shared = self.prefix_cache.shareable(copied)
            if source is not None and source is not kv and copied > shared:
                if not used:
                    copy = ScheduledRequest(request, kv, copied, copied, False)
                    output.scheduled.append(copy)
                output.scheduled[-1].source, output.scheduled[-1].copied = source, copied
            budget -= used
        return budget, True

    def _allocate(
        self, request: Request, source: SequenceKV | None, copied: int, *, whole: bool
    ) -> SequenceKV | None:
        """A KV cache that begins with `copied` tokens of `source`; None if there is no memory now,
        or not for the `whole` answer.

        A cached sequence that has little else is reused in place, as is one that there is no memory
        to copy.
        """
        cache, length = self.prefix_cache, len(request.tokens)
        key = request.cache_key.extended(request.tokens[len(request.cache_key.ids) :], length)
        max_tokens = request.max_kv_tokens
        sizes = [min(length + more, max_tokens) for more in (DECODE_RESERVE, HASH_BLOCK)]
        if whole:
            sizes = [max_tokens]
        if cache.allocator and source is not None:
            return self._share_blocks(key, source, copied, sizes)
        idle = source if source is not None and not source.running else None
        if idle is None or idle.length - copied > max(HASH_BLOCK, copied // COPY_SPEEDUP):
            if idle is not None:
                cache.pinned.add(idle)
            for size in sizes:
                kv = SequenceKV(key, copied)
                if cache.reserve(kv, size):
                    cache.start(kv)
                    if idle is not None:
                        cache.idle.move_to_end(idle)
                    return kv
        if idle is not None:
            for size in sizes:
                if cache.reserve(idle, max(size, idle.capacity)):
                    cache.reuse(idle, key, copied)
                    return idle
        return None

    def _share_blocks(
        self, key: CacheKey, source: SequenceKV, copied: int, sizes: list[int]
    ) -> SequenceKV | None:
        """A sequence that shares the whole blocks of `copied` tokens, and has a copy of the rest.

        Without memory for the copy the rest is computed again.
        """
        cache, whole = self.prefix_cache, self.prefix_cache.shareable(copied)
        without_copy = 0 if self.chunk_size and whole % self.chunk_size else whole
        for length in dict.fromkeys((copied, without_copy)):
            kv = SequenceKV(key, length)
            cache.share(kv, source, length)
            pins = {source} - cache.pinned if length > whole else set()
            cache.pinned |= pins
            if any(cache.reserve(kv, size) for size in sizes):
                cache.start(kv)
                if source in cache.idle:
                    cache.idle.move_to_end(source)
                return kv
            cache.release(kv)
            cache.pinned -= pins
        return None

    def record_time(
        self, output: SchedulerOutput, seconds: float, encode_seconds: float, now: float
    ) -> None:
        """A step has taken `seconds` until now, of which `encode_seconds` in the encoder; before
        `commit`.
        """
        self.step_times.update(output, seconds, encode_seconds)
        self.saved_time.spend(seconds, (one.request.client for one in output.scheduled), now)
        shortest = min(self.step_times.decodes.values(), default=0.0)
        self.saved_time.limit = max(SAVED_SECONDS, SAVED_STEPS * shortest)

    def commit(
        self,
        output: SchedulerOutput,
        picks: Sequence[Sequence[Pick]],
        eos_ids: frozenset[int],
        now: float,
    ) -> list[Event]:
        """Record the results of a step and return its events.

        picks: for each request that samples, its accepted draft tokens and one more token.
        """
        events, sampled = [], iter(picks)
        for one in output.scheduled:
            request, kv = one.request, one.kv
            kv.length = one.stop
            if (
                self.chunk_size
                and one.start == kv.chunked_length
                and one.stop % self.chunk_size == 0
            ):
                kv.chunked_length = one.stop
            for encoded in islice(request.encoder_inputs, request.first_input, request.held_input):
                if encoded.stop > one.stop:
                    break
                self.encoder_cache.release(encoded.key)
                request.first_input += 1
            if request.prefill_only and one.stop == len(request.tokens):
                events.append(self.end(request, "prefill", now))
            if not one.sample:
                continue
            tokens, drafted = next(sampled), len(one.draft_tokens)
            kv.length -= drafted
            if request.first_token is None:
                request.first_token = now
            if request.drafter is not None and drafted:
                request.drafter.update(drafted, len(tokens) - 1)
                request.drafted += drafted
            for number, pick in enumerate(tokens):
                if pick.token < 0:
                    events.append(self.end(request, "error", now, error=_not_finite()))
                    break
                kv.length += number > 0
                request.accepted += number > 0
                request.tokens.append(pick.token)
                if (reason := _finish_reason(request, pick.token, eos_ids)) is not None:
                    events.append(self.end(request, reason, now, pick))
                    break
                events.append(Event(request, *pick))
        return events

    def _retire(self, request: Request) -> None:
        """Take a request out of the running ones; its KV cache becomes a cached prefix."""
        kv, key = request.kv, request.cache_key
        assert kv is not None
        self.running.remove(request)
        self._release_features(request)
        self.prefix_cache.retire(kv, key.extended(request.tokens[len(key.ids) :], kv.length))
        request.kv = None

    def end(
        self,
        request: Request,
        reason: FinishReason,
        now: float,
        pick: Pick | None = None,
        error: Exception | None = None,
    ) -> Event:
        """Remove a request; its KV cache becomes a cached prefix unless the reason is an error."""
        kv = request.kv
        if kv is None:
            self._queue(request).remove(request)
        elif reason == "error":
            self._free(request)
        else:
            self._retire(request)
        self.preempted_clients.discard(request.client)
        for counters in (self.virtual_tokens, self.decoded_tokens, self.saved_time):
            counters.leave(request.client)
        request.finish_reason, request.ended, request.sampler = reason, now, None
        token, logprob, top, allowed = pick or (None, None, (), 0.0)
        usage, timings = request.usage, request.timings(now)
        return Event(request, token, logprob, top, allowed, reason, usage, timings, error)


def _decodes(request: Request) -> bool:
    """Whether the next token of a running request is the only one to compute."""
    assert request.kv is not None
    last = len(request.tokens) - request.kv.length == 1
    return last and request.first_input == len(request.encoder_inputs) and not request.prefill_only


def _not_finite() -> RuntimeError:
    return RuntimeError(
        "the network computed values that are not finite, as float16 may: use bfloat16 or float32"
    )


def _finish_reason(request: Request, token: int, eos_ids: frozenset[int]) -> FinishReason | None:
    """Why a request ends with this token, its last so far; None if it does not."""
    sampling = request.sampling
    if token in sampling.stop_ids or (token in eos_ids and not sampling.ignore_eos):
        return "stop"
    if len(request.tokens) > request.max_kv_tokens:
        return "length"
    checked = sampling.stop_on_repetition and not sampling.ignore_eos
    if checked and ends_in_loop(request.tokens, len(request.prompt.tokens)):
        return "repetition"
    return None
