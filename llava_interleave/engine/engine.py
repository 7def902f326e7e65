"""The engine: requests in, events out, three verbs a step. Knows no text, files or HTTP."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import numpy as np

from ..errors import ContextError, DataError, OptionError, PromptError, Unsupported
from ..lora import Adapters
from ..model import Llava
from ..options import SamplingParams
from ..prompt import Media, Prompt
from .kv_paged import KV_BLOCK_SIZE, PagedKVCache
from .kv_snapshot import KVSnapshot, adapter_hash, made_by, mismatch_reason, sequence
from .model_runner import Runner
from .prefix_cache import (
    HASH_BLOCK,
    BlockAllocator,
    CacheKey,
    EncoderCache,
    MediaId,
    PrefixCache,
    SequenceKV,
    salted,
)
from .prompt_lookup import DEFAULT_DRAFT_TOKENS, PromptLookupDrafter
from .request import Event, FinishReason, Request
from .sampler import Pick, TokenConstraint
from .scheduler import Scheduler, SchedulerOutput

KV_PRECISIONS = ("auto", "int8")


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is. KV in tokens: of `kv_total`, `kv_running` belong to running requests and `kv_cached` to prefixes.

    crops_encoded: by the tower since the start.
    """

    waiting: int
    running: int
    kv_total: int
    kv_running: int
    kv_cached: int
    feature_bytes: int
    crops_encoded: int


class Engine:
    """Answers many requests at once with one model; what else is running never changes an answer.

    eos_ids end an answer. vocab: ids from here on have no meaning and are never generated, nor is the image placeholder.
    kv_bytes: all keys and values, running and cached. feature_bytes: image features kept beside those in use.
    max_num_batched_tokens: of prompts and answers computed in a step, so that long prompts do not hold up other answers for long.
    max_batched_images: in a call of the tower. max_num_seqs: requests at a time. clock: seconds.
    kv_precision: of keys and values, "auto" as the network computes or "int8", which takes half the memory of bfloat16.
    kv_block: tokens of a block of the pool that keys and values lie in, or 0: a slab a sequence, made as it is needed. None is
        256 on a GPU, whose kernels want that, and 0 elsewhere. A pool is made at once: `measured` says what there is room for.
    deterministic: an answer and its log probabilities are the same to the last bit whatever else is running, cached or
        pre-empted: each sequence is computed in calls of its own, of shapes that nothing else decides. On a GPU that rests on its
        libraries, which repeat themselves for equal shapes. Several answers at once cost more, least with quantized weights.

    adapters: those that a request can choose from, by name; none at first.

    Used from one thread: nothing here is locked. A server gives it a thread of its own and talks to that.
    """

    def __init__(
        self,
        model: Llava,
        *,
        eos_ids: Collection[int],
        vocab: int,
        kv_bytes: int,
        feature_bytes: int = 256 << 20,
        max_num_batched_tokens: int = 1024,
        max_batched_images: int = 8,
        max_num_seqs: int = 64,
        kv_precision: str = "auto",
        kv_block: int | None = None,
        deterministic: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        text, device = model.config.text, model.lm_head.weight.device.type
        if not 0 < vocab <= text.vocab_size:
            raise OptionError(
                f"vocab must be between 1 and the network's {text.vocab_size}, not {vocab}"
            )
        if max_num_seqs < 1 or max_batched_images < 1 or max_num_batched_tokens < max_num_seqs:
            raise OptionError(
                f"max_num_seqs ({max_num_seqs}) and max_batched_images ({max_batched_images}) must be at least 1, "
                f"and max_num_batched_tokens ({max_num_batched_tokens}) at least max_num_seqs"
            )
        if kv_precision not in KV_PRECISIONS:
            raise OptionError(
                f"{kv_precision!r} is no precision of keys and values; there are {', '.join(KV_PRECISIONS)}"
            )
        if deterministic and device not in ("cpu", "cuda"):
            raise Unsupported(
                f"deterministic answers are there on a CPU or a CUDA GPU, not on {device}; add device='cpu'"
            )
        self.model, self.eos_ids, self.vocab, self.clock = model, frozenset(eos_ids), vocab, clock
        self.adapters = Adapters(model)
        self._features = EncoderCache(feature_bytes)
        self._runner = Runner(
            model,
            self._features,
            self.adapters.route,
            vocab=vocab,
            max_batched_images=max_batched_images,
            max_num_seqs=max_num_seqs,
            kv_bytes=kv_bytes,
            kv_block=(KV_BLOCK_SIZE if device == "cuda" else 0) if kv_block is None else kv_block,
            kv_in_eight_bits=kv_precision == "int8",
            alone=deterministic,
            clock=clock,
        )
        memory = self._runner.memory
        self.bytes_per_token = memory.bytes_per_token
        pages = (
            BlockAllocator(memory.count, memory.block) if isinstance(memory, PagedKVCache) else None
        )
        self._prefixes = PrefixCache(
            pages.size * len(pages.free) if pages else kv_bytes // self.bytes_per_token, pages
        )
        self._scheduler = Scheduler(
            self._prefixes,
            self._features,
            max_num_batched_tokens=max_num_batched_tokens,
            max_batched_images=max_batched_images,
            max_num_seqs=max_num_seqs,
            piece=max_num_batched_tokens // 2 if deterministic else 0,
        )
        self.deterministic = deterministic
        self._identities: WeakValueDictionary[bytes, MediaId] = WeakValueDictionary()
        self._numbers, self._ids = count(), count()
        self._events: list[Event] = []

    def add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        salt: bytes = b"",
        constraint: TokenConstraint | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Queue a request, whose events `step` returns. Prefixes and features are shared among requests of equal `salt` only.

        constraint: limits which tokens may come next. adapter: the name of one of `adapters`, through which it is computed.
        ContextError if it could never fit, PromptError if placeholders and media do not agree, OptionError for a name that is
        not there.
        """
        request = self._request(prompt, sampling or SamplingParams(), salt, adapter)
        if constraint is not None:
            request.constraint, request.plain, request.lookup = constraint, False, None
        self._scheduler.add(request)
        return request

    def step(self, prefill_time_budget: float = math.inf) -> list[Event]:
        """Compute one step and return the events since the last call.

        prefill_time_budget: seconds that running answers wait for prompts and images in a step, as
        far as these can be cut. Answers then get as much time as prompts had, so that they keep at
        least half of their speed.

        Out of memory, or another RuntimeError, ends the requests of the step with finish_reason
        "error"; any other exception does so too and is raised. The engine continues with the rest.
        """
        plan = SchedulerOutput()
        try:
            plan = self._scheduler.schedule(prefill_time_budget)
            if plan.work:
                self._compute(plan)
        except BaseException as exception:
            error = (
                exception
                if isinstance(exception, RuntimeError | MemoryError)
                else RuntimeError(f"the step was interrupted: {exception!r}")
            )
            for work in plan.work:
                if work.request.finish_reason is None:
                    self._events.append(self._end(work.request, "error", error))
            self._runner.recover(error)
            if error is not exception:
                raise
        events, self._events = self._events, []
        return events

    def _compute(self, plan: SchedulerOutput) -> None:
        began, encoding = self.clock(), self._runner.encoding
        for work in plan.work:
            if work.request.started is None:
                work.request.started = began
        picks = self._run(plan)
        ended = self.clock()
        self._scheduler.pace.learn(plan, ended - began, self._runner.encoding - encoding)
        self._events += self._scheduler.commit(plan, picks, self.eos_ids, ended)

    def _run(self, plan: SchedulerOutput) -> list[list[Pick]]:
        return self._runner.run(plan)

    def _end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> Event:
        return self._scheduler.end(request, reason, self.clock(), error=error)

    @property
    def busy(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self._scheduler.running or self._scheduler.waiting or self._events)

    def abort(self, request: Request) -> Event | None:
        """End a request now and give back its memory; its last event, None if it had ended already."""
        return None if request.finish_reason is not None else self._end(request, "abort")

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        salt: bytes = b"",
        adapter: str | None = None,
    ) -> list[Request]:
        """Add all prompts and step until they are answered; `sampling` is one for all or one each.

        Events of other requests are kept for the next `step`. An error is raised.
        """
        each = sampling or SamplingParams()
        each = [each] * len(prompts) if isinstance(each, SamplingParams) else each
        requests: list[Request] = []
        others: list[Event] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                requests.append(self.add(prompt, one, salt=salt, adapter=adapter))
            mine = set(requests)
            while any(request.finish_reason is None for request in requests):
                for event in self.step():
                    if event.request not in mine:
                        others.append(event)
                    elif event.error is not None:
                        raise event.error
        finally:
            for request in requests:
                self.abort(request)
            self._events += others
        return requests

    def _request(
        self, prompt: Prompt, sampling: SamplingParams, salt: bytes, adapter: str | None
    ) -> Request:
        config, length = self.model.config, len(prompt)
        if not length:
            raise PromptError("the prompt has no tokens")
        tokens = np.array(prompt.tokens, dtype=np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.text.vocab_size:
            raise PromptError(
                f"token ids must be between 0 and {config.text.vocab_size - 1}; the prompt has {low} to {high}"
            )
        expected = [
            media.start + offset for media in prompt.media for offset in range(media.layout.length)
        ]
        found = np.flatnonzero(tokens == config.image_token_id).tolist()
        if found != expected:
            raise PromptError(
                f"the prompt has {len(found)} image placeholders, but its {len(prompt.media)} media take {len(expected)} "
                "at the places they name"
            )
        for token in sampling.logit_bias:
            if token >= self.vocab:
                raise OptionError(
                    f"logit_bias names token {token}, but the vocabulary has {self.vocab}"
                )
        left, context = config.text.context - length, config.text.context
        fits = min(left, self._prefixes.total - length + 1)
        wanted = sampling.max_new_tokens or max(1, fits)
        if wanted > left:
            raise ContextError(
                f"the prompt has {length} tokens and {wanted} more were asked for, but the context is {context}: "
                + (
                    f"ask for at most {left}"
                    if left > 0
                    else f"use {1 - left} fewer, with fewer images or frames"
                )
            )
        if wanted > fits:
            need, have = length + wanted - 1, self._prefixes.total
            raise ContextError(
                f"{length} tokens and {wanted} more need {need * self.bytes_per_token:,} bytes of KV memory, but there are "
                f"{have * self.bytes_per_token:,} ({have} tokens): raise kv_bytes, or ask for fewer tokens, images or frames"
            )
        through, encoder = self.adapters.keys(adapter)
        guessed, exact = (
            sampling.prompt_lookup_num_tokens,
            self._runner.fused is not None and not through,
        )
        if guessed is None or (
            self.deterministic and not exact
        ):  # else several tokens are rounded otherwise than one
            guessed = DEFAULT_DRAFT_TOKENS if exact else 0
        return Request(
            next(self._ids),
            prompt,
            sampling,
            self._keys(prompt.tokens, prompt.media, salted(salt, through)),
            wanted,
            self.clock(),
            adapter=through,
            encoder=encoder,
            salt=salted(salt, encoder),
            lookup=PromptLookupDrafter(guessed, config.image_token_id) if guessed else None,
        )

    def _keys(self, tokens: Sequence[int], media: Sequence[Media], salt: bytes) -> CacheKey:
        return CacheKey.of(
            tokens, [(m.start, m.layout.length, self._identity(m.key)) for m in media], salt
        )

    def _identity(self, key: bytes) -> MediaId:
        identity = self._identities.get(key)
        if identity is None:
            identity = self._identities[key] = MediaId(next(self._numbers))
        return identity

    def keys(
        self, prompt: Prompt, answer: Sequence[int] = (), *, adapter: str | None = None
    ) -> CacheKey:
        """What the tokens of a prompt and of its answer stand for: `save` finds by it what was computed of them."""
        salt = salted(b"", self.adapters.keys(adapter)[0])
        return self._keys([*prompt.tokens, *answer], prompt.media, salt)

    def save(self, keys: CacheKey) -> KVSnapshot | None:
        """Keys and values of as much of the beginning of a sequence as is in memory; None where that is too little to be of use.

        The tensors are this engine's memory and hold until its next step. OptionError for what was asked under a salt: it is for
        requests of equal salt only.
        """
        adapter = next((key for key in self._adapters() if salted(b"", key) == keys.salt), None)
        if adapter is None:
            raise OptionError(
                "what was computed under a salt is for requests of that salt only: it is not saved"
            )
        kv, length, _ = self._prefixes.find(keys, len(keys.numbers))
        if kv is None or length < HASH_BLOCK:
            return None
        keys = keys.through([], length)
        media = {identity.number: key for key, identity in self._identities.items()}
        about = made_by(self.model, self._runner.memory.dtype) | {
            "adapter": adapter_hash(self.model, adapter),
            "tokens": np.where(
                keys.numbers < 0, self.model.config.image_token_id, keys.numbers
            ).tolist(),
            "images": [
                [start, count, media[number].hex()] for start, count, number in keys.spans()
            ],
        }
        return KVSnapshot(about, self._runner.memory.stored(kv, length))

    def restore(self, saved: KVSnapshot) -> CacheKey:
        """Take in what `save` gave, of this engine or another, as a cached prefix; what it is of.

        Requests without a salt find it. On a CPU the tensors given become this engine's memory. Raises DataError, in words, for
        what was computed otherwise than it would be here, is damaged, or has no room, and where answers are deterministic.
        """
        if self.deterministic:
            raise DataError("deterministic answers build on nothing that was computed elsewhere")
        if reason := mismatch_reason(saved.about, made_by(self.model, self._runner.memory.dtype)):
            raise DataError(reason)
        adapter = next(
            (
                key
                for key in self._adapters()
                if adapter_hash(self.model, key) == saved.about.get("adapter")
            ),
            None,
        )
        if adapter is None:
            raise DataError(
                "these keys and values were computed through an adapter that is not loaded here"
            )
        text = self.model.config.text
        tokens, images = sequence(saved.about, text.vocab_size, self.model.config.image_token_id)
        found = [(start, count, self._identity(key)) for start, count, key in images]
        kv = SequenceKV(CacheKey.of(tokens, found, salted(b"", adapter)), len(tokens))
        slab, keys = self._runner.memory.slab(saved.tensors, len(tokens)), kv.keys
        if not self._prefixes.insert(kv):
            load = self.load()
            raise DataError(
                f"{len(tokens)} tokens have no room: there is memory for the keys and values of {load.kv_total}, of which "
                f"{load.kv_running} are in use: raise kv_bytes"
            )
        if kv.capacity:  # unless all of it was there
            self._runner.memory.adopt(kv, slab)
        return keys

    def _adapters(self) -> list[str]:
        """Keys of all that a token can be computed through, first of the network alone."""
        return [self.adapters.keys(name)[0] for name in (None, *self.adapters.names)]

    def load(self) -> Load:
        """How busy it is now."""
        prefixes = self._prefixes
        return Load(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            kv_total=prefixes.total,
            kv_running=prefixes.used - prefixes.idle_tokens,
            kv_cached=prefixes.idle_tokens,
            feature_bytes=self._features.bytes,
            crops_encoded=self._runner.crops_encoded,
        )

    @property
    def attention(self) -> str:
        """What computes attention here, and whether decode steps are captured, in words."""
        return self._runner.attention

    def clear(self) -> None:
        """Drop all cached prefixes and features."""
        self._prefixes.clear()
        self._features.clear()

    def check(self) -> None:
        """Assert that memory is accounted for to the last token; for tests."""
        scheduler = self._scheduler
        self._prefixes.check()
        assert {id(request.kv) for request in scheduler.running} == {
            id(kv) for kv in self._prefixes.running
        }
        assert all(
            request.kv is None and request.first_unit == request.held_unit == 0
            for request in scheduler.waiting
        )
        assert all(
            request.finish_reason is None for request in [*scheduler.running, *scheduler.waiting]
        )
        held: Counter[tuple[bytes, int]] = Counter()
        for request in scheduler.running:
            held.update(unit.key for unit in request.units[request.first_unit : request.held_unit])
        self._features.check(held)
