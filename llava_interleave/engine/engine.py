"""The engine: requests in, events out. Knows no text, files or HTTP."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from ..errors import DataError, OptionError, Unsupported
from ..lora import Adapters
from ..model import Llava, StoredKV
from ..options import SamplingParams
from ..prompt import Prompt
from .block_allocator import BlockAllocator
from .encoder_cache import EncoderCache
from .encoder_disk_cache import EncoderDiskCache
from .kv_budget import default_batched_tokens
from .kv_paged import KV_BLOCK_SIZE, PagedKVCache
from .kv_snapshot import KVSnapshot, KVSnapshots
from .model_runner import ModelRunner
from .prefix_cache import CacheKey, MediaIds, PrefixCache, salted
from .prompt_lookup import DEFAULT_DRAFT_TOKENS, PromptLookupDrafter
from .request import Event, FinishReason, Request
from .sampler import Pick, TokenConstraint
from .scheduler import Scheduler, SchedulerOutput
from .validate import check_prompt, check_sampling, resolve_max_new_tokens

if TYPE_CHECKING:
    from torch import Tensor

KV_PRECISIONS = ("auto", "int8")


@dataclass(frozen=True, slots=True)
class Load:
    """The load of an engine. KV memory in tokens: of `kv_total`, running requests use `kv_running`
    and cached prefixes `kv_cached`. crops_encoded: by the vision encoder since the start.
    """

    waiting: int
    running: int
    kv_total: int
    kv_running: int
    kv_cached: int
    feature_bytes: int
    crops_encoded: int


@dataclass(frozen=True, slots=True)
class CachedPrompt:
    """What an engine has computed of a prompt, for any thread: later steps do not change it.

    length: tokens whose KV cache, with RoPE, is in `stored`: by layer `[length, Hkv, d]`.
    features: of each media `[layout.length, D]`, or None where they are not cached.
    """

    length: int
    stored: StoredKV
    features: tuple[Tensor | None, ...]


class Engine:
    """Continuous batching for one model; other requests never change an answer.

    eos_ids: end an answer. vocab: larger ids, and the image placeholder, are never generated.
    kv_bytes: of the KV memory, running and cached. feature_bytes: of cached image features, in
        addition to those in use.
    max_num_batched_tokens: of a step, so that long prompts do not delay other answers for long.
        Default: 4,096 on a CUDA GPU, 1,024 elsewhere.
    max_batched_images: crops per call of the vision encoder. max_num_seqs: running requests.
    kv_precision: "auto" is the dtype of the computation; "int8" takes half the memory of bfloat16.
    kv_block_size: tokens per block of a paged KV cache; 0: contiguous, allocated as needed.
        Default: 256 on a GPU, 0 elsewhere. A paged cache is allocated at once: see
        `profile_kv_bytes`.
    batch_invariant: an answer and its log-probabilities are equal to the last bit for any other
        load, cache and preemption: each request is computed by calls of its own, whose shapes do
        not depend on others. On a GPU it relies on libraries that repeat themselves for equal
        shapes.
        Concurrent requests are slower, least with quantized weights.
    clock: seconds.

    adapters: LoRA adapters by name that a request can use; none at first.

    Not thread-safe: use it from one thread, or with a lock.
    """

    def __init__(
        self,
        model: Llava,
        *,
        eos_ids: Collection[int],
        vocab: int,
        kv_bytes: int,
        feature_bytes: int = 256 << 20,
        max_num_batched_tokens: int | None = None,
        max_batched_images: int = 8,
        max_num_seqs: int = 64,
        kv_precision: str = "auto",
        kv_block_size: int | None = None,
        batch_invariant: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        text, device = model.config.text, model.lm_head.weight.device.type
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(
                max_num_seqs, default_batched_tokens(model.lm_head.weight.device)
            )
        if not 0 < vocab <= text.vocab_size:
            raise OptionError(
                f"vocab must be between 1 and the model's {text.vocab_size}, not {vocab}"
            )
        if min(max_num_seqs, max_batched_images) < 1 or max_num_batched_tokens < max_num_seqs:
            raise OptionError(
                f"max_num_seqs ({max_num_seqs}) and max_batched_images ({max_batched_images}) must "
                f"be at least 1, and max_num_batched_tokens ({max_num_batched_tokens}) at least "
                "max_num_seqs"
            )
        if kv_precision not in KV_PRECISIONS:
            raise OptionError(
                f"unknown kv_precision {kv_precision!r}; choose {' or '.join(KV_PRECISIONS)}"
            )
        if batch_invariant and device not in ("cpu", "cuda"):
            raise Unsupported(
                f"batch_invariant needs a CPU or a CUDA GPU, not {device}; add device='cpu'"
            )
        self.model, self.eos_ids, self.vocab, self.clock = model, frozenset(eos_ids), vocab, clock
        self.batch_invariant = batch_invariant
        self.adapters = Adapters(model)
        self._encoder_cache = EncoderCache(feature_bytes)
        if kv_block_size is None:
            kv_block_size = KV_BLOCK_SIZE if device == "cuda" else 0
        self._runner = ModelRunner(
            model,
            self._encoder_cache,
            self.adapters.route,
            vocab=vocab,
            max_batched_images=max_batched_images,
            max_num_seqs=max_num_seqs,
            kv_bytes=kv_bytes,
            kv_block_size=kv_block_size,
            kv_int8=kv_precision == "int8",
            batch_invariant=batch_invariant,
            clock=clock,
        )
        kv_cache = self._runner.kv_cache
        self.bytes_per_token = kv_cache.bytes_per_token
        if isinstance(kv_cache, PagedKVCache):
            blocks, size = kv_cache.num_blocks, kv_cache.block_size
            self._prefix_cache = PrefixCache(blocks * size, BlockAllocator(blocks, size))
        else:
            self._prefix_cache = PrefixCache(kv_bytes // self.bytes_per_token)
        self._media_ids = MediaIds()
        self._snapshots = KVSnapshots(
            model, self.adapters, self._prefix_cache, kv_cache, self._media_ids
        )
        self._scheduler = Scheduler(
            self._prefix_cache,
            self._encoder_cache,
            max_num_batched_tokens=max_num_batched_tokens,
            max_batched_images=max_batched_images,
            max_num_seqs=max_num_seqs,
            chunk_size=max_num_batched_tokens // 2 if batch_invariant else 0,
        )
        self._ids = count()
        self._events: list[Event] = []

    def use_encoder_disk_cache(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        """Keep image features in a folder too, of requests without a salt and an encoder adapter.

        Raises DataError where the folder cannot be used.
        """
        self._runner.encoder_disk_cache = EncoderDiskCache(folder, max_bytes, self.model)

    def add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        salt: bytes = b"",
        constraint: TokenConstraint | None = None,
        adapter: str | None = None,
        prefill_only: bool = False,
        client: str = "",
        weight: float = 1.0,
    ) -> Request:
        """Queue a request. Cached prefixes and features are shared among requests of equal `salt`.

        constraint: limits which tokens may come next. adapter: the name of one of `adapters`.
        prefill_only: compute the prompt into the prefix cache and end with finish_reason "prefill",
        while there is nothing else to do.
        client: clients share the engine in proportion to their `weight` (see `Scheduler`).
        Raises ContextError if it can never fit, PromptError if placeholders and media do not match,
        OptionError for an unknown adapter or token.
        """
        sampling, config = sampling or SamplingParams(), self.model.config
        if prefill_only:
            sampling = SamplingParams(max_new_tokens=1)
        check_prompt(prompt, config)
        check_sampling(sampling, self.vocab)
        max_new_tokens = resolve_max_new_tokens(
            sampling,
            len(prompt),
            config.text.context,
            self._prefix_cache.total,
            self.bytes_per_token,
        )
        decoder_adapter, encoder_adapter = self.adapters.keys(adapter)
        request = Request(
            next(self._ids),
            prompt,
            sampling,
            self._media_ids.cache_key(prompt.tokens, prompt.media, salted(salt, decoder_adapter)),
            max_new_tokens,
            self.clock(),
            adapter=decoder_adapter,
            encoder_adapter=encoder_adapter,
            encoder_salt=salted(salt, encoder_adapter),
            prefill_only=prefill_only,
            client=client,
            weight=weight,
        )
        if constraint is not None:
            request.constraint, request.constrained, request.argmax_only = constraint, True, False
        elif not prefill_only and (draft_tokens := self._draft_tokens(sampling, decoder_adapter)):
            request.drafter = PromptLookupDrafter(draft_tokens, config.placeholder_ids)
        self._scheduler.add(request)
        return request

    def _draft_tokens(self, sampling: SamplingParams, adapter: str) -> int:
        """Draft tokens per step. Only the fused layers round several tokens as they round one."""
        exact = self._runner.fused is not None and not adapter
        draft_tokens = sampling.prompt_lookup_num_tokens
        if draft_tokens is None or (self.batch_invariant and not exact):
            return DEFAULT_DRAFT_TOKENS if exact else 0
        return draft_tokens

    def step(self, prefill_time_budget: float = math.inf) -> list[Event]:
        """Compute one step and return the events since the last call.

        prefill_time_budget: seconds that running answers wait for prompts and images in a step, as
        far as these can be cut. Answers then get as much time as prompts had, so that they keep at
        least half of their speed.

        Out of memory, or another RuntimeError, ends the requests of the step with finish_reason
        "error"; any other exception does so too and is raised. The engine continues with the rest.
        """
        output = SchedulerOutput()
        try:
            output = self._scheduler.schedule(prefill_time_budget)
            if output.scheduled:
                self._compute(output)
        except BaseException as exception:
            error = (
                exception
                if isinstance(exception, RuntimeError | MemoryError)
                else RuntimeError(f"the step was interrupted: {exception!r}")
            )
            for one in output.scheduled:
                if one.request.finish_reason is None:
                    self._events.append(self._end(one.request, "error", error))
            self._runner.recover(error)
            if error is not exception:
                raise
        events, self._events = self._events, []
        return events

    def _compute(self, output: SchedulerOutput) -> None:
        began, encode_seconds = self.clock(), self._runner.encode_seconds
        for one in output.scheduled:
            if one.request.started is None:
                one.request.started = began
        picks = self._run(output)
        ended, encode_seconds = self.clock(), self._runner.encode_seconds - encode_seconds
        self._scheduler.record_time(output, ended - began, encode_seconds, ended)
        self._events += self._scheduler.commit(output, picks, self.eos_ids, ended)

    def _run(self, output: SchedulerOutput) -> list[list[Pick]]:
        return self._runner.run(output)

    def _end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> Event:
        return self._scheduler.end(request, reason, self.clock(), error=error)

    @property
    def busy(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self._scheduler.busy or self._events)

    def abort(self, request: Request) -> Event | None:
        """End a request now and free its memory; its last event, None if it had ended already."""
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
            own = set(requests)
            while any(request.finish_reason is None for request in requests):
                for event in self.step():
                    if event.request not in own:
                        others.append(event)
                    elif event.error is not None:
                        raise event.error
        finally:
            for request in requests:
                self.abort(request)
            self._events += others
        return requests

    def cache_key(
        self, prompt: Prompt, answer: Sequence[int] = (), *, adapter: str | None = None
    ) -> CacheKey:
        """The cache key of a prompt and its answer, for `save`."""
        salt = salted(b"", self.adapters.keys(adapter)[0])
        return self._media_ids.cache_key([*prompt.tokens, *answer], prompt.media, salt)

    def save(self, key: CacheKey) -> KVSnapshot | None:
        """The KV cache of the longest prefix of a sequence in memory; None if that is too short.

        The tensors are this engine's memory and valid until its next step. Raises OptionError for
        a sequence computed under a salt, which only requests of equal salt may use.
        """
        return self._snapshots.save(key)

    def cached_prompt(
        self, prompt: Prompt, *, salt: bytes = b"", adapter: str | None = None
    ) -> CachedPrompt:
        """What is cached of a prompt under this salt and adapter; nothing is computed."""
        decoder_adapter, encoder_adapter = self.adapters.keys(adapter)
        key = self._media_ids.cache_key(prompt.tokens, prompt.media, salted(salt, decoder_adapter))
        encoder_salt = salted(salt, encoder_adapter)
        features = (self._encoder_cache.features(m, encoder_salt) for m in prompt.media)
        return CachedPrompt(*self._snapshots.lend(key), tuple(features))

    def restore(self, snapshot: KVSnapshot) -> CacheKey:
        """Add a snapshot of this or another engine to the prefix cache; returns its cache key.

        Requests without a salt find it. On a CPU the given tensors become this engine's memory.
        Raises DataError for one that another model, precision or adapter computed, that is damaged
        or does not fit, and if the engine is batch-invariant.
        """
        if self.batch_invariant:
            raise DataError("a batch-invariant engine cannot use a KV cache computed elsewhere")
        return self._snapshots.restore(snapshot)

    def load(self) -> Load:
        """The current load."""
        cache = self._prefix_cache
        return Load(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            kv_total=cache.total,
            kv_running=cache.used - cache.idle_tokens,
            kv_cached=cache.idle_tokens,
            feature_bytes=self._encoder_cache.bytes,
            crops_encoded=self._runner.crops_encoded,
        )

    @property
    def attention(self) -> str:
        """A description of the attention backend and of CUDA graphs."""
        return self._runner.attention

    def clear(self) -> None:
        """Drop all cached prefixes and features."""
        self._prefix_cache.clear()
        self._encoder_cache.clear()

    def check(self) -> None:
        """Assert that all memory is accounted for; for tests."""
        running = self._scheduler.running
        waiting = [*self._scheduler.waiting, *self._scheduler.waiting_prefills]
        self._prefix_cache.check()
        assert {id(request.kv) for request in running} == set(map(id, self._prefix_cache.running))
        assert all(request.kv is None for request in waiting)
        assert all(request.first_input == request.held_input == 0 for request in waiting)
        assert all(request.finish_reason is None for request in [*running, *waiting])
        holds: Counter[tuple[bytes, int]] = Counter()
        for request in running:
            held = request.encoder_inputs[request.first_input : request.held_input]
            holds.update(one.key for one in held)
        self._encoder_cache.check(holds)
