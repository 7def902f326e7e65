"""Account of all KV memory: running sequences, and ended ones as a cache of prefixes.

Owns no tensor: `kv_contiguous` and `kv_paged` do.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ..prompt import Media
from .block_allocator import BlockAllocator

if TYPE_CHECKING:
    from .kv_contiguous import ContiguousKV

HASH_BLOCK = 32
"""Tokens per block of the hash chain; a shorter common prefix is not worth a copy."""


class MediaId:
    """Identifies a media key while any cache key refers to it. A `number` is never used twice."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


class MediaIds:
    """The ids of media keys, and cache keys made with them."""

    def __init__(self) -> None:
        self._ids: WeakValueDictionary[bytes, MediaId] = WeakValueDictionary()
        self._numbers = count()

    def of(self, key: bytes) -> MediaId:
        media_id = self._ids.get(key)
        if media_id is None:
            media_id = self._ids[key] = MediaId(next(self._numbers))
        return media_id

    def by_number(self) -> dict[int, bytes]:
        """The media key of each number."""
        return {media_id.number: key for key, media_id in self._ids.items()}

    def cache_key(self, tokens: Sequence[int], media: Iterable[Media], salt: bytes) -> CacheKey:
        spans = [(one.start, one.layout.length, self.of(one.key)) for one in media]
        return CacheKey.of(tokens, spans, salt)


@dataclass(frozen=True, slots=True, eq=False)
class CacheKey:
    """The content of each token of a sequence: sequences with equal ids have an equal KV cache.

    ids: token ids; for an image placeholder a negative number of (media, offset).
    block_hashes: of the salt and all tokens up to the end of each whole block.
    """

    ids: NDArray[np.int64]
    salt: bytes
    media_ids: tuple[MediaId, ...]
    block_hashes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        media: Iterable[tuple[int, int, MediaId]] = (),
        salt: bytes = b"",
    ) -> CacheKey:
        """`media`: (index of the first placeholder, number of placeholders, id) of each."""
        ids, media_ids = np.array(tokens, dtype=np.int64), []
        for start, length, media_id in media:
            ids[start : start + length] = -1 - (media_id.number << 24) - np.arange(length)
            media_ids.append(media_id)
        return cls(ids, salt, tuple(media_ids), _block_hashes(ids, salt))

    def extended(self, tokens: Sequence[int], length: int) -> CacheKey:
        """The first `length` of these ids followed by `tokens`."""
        if not tokens and length == len(self.ids):
            return self
        ids = np.concatenate([self.ids, np.array(tokens, dtype=np.int64)])[:length]
        return CacheKey(ids, self.salt, self.media_ids, _block_hashes(ids, self.salt))

    def media_spans(self) -> Iterator[tuple[int, int, int]]:
        """(index of the first placeholder, number of placeholders, number of the media id)."""
        at = np.flatnonzero(self.ids < 0)
        numbers, offsets = np.divmod(-1 - self.ids[at], 1 << 24)
        first = np.flatnonzero(offsets == 0)
        lengths = np.diff(first, append=len(at))
        yield from zip(at[first].tolist(), lengths.tolist(), numbers[first].tolist(), strict=True)

    def common_prefix(self, other: CacheKey) -> int:
        """The number of tokens that both begin with."""
        n = min(len(self.ids), len(other.ids))
        differ = self.ids[:n] != other.ids[:n]
        first = int(differ.argmax()) if n else 0
        return first if n and differ[first] else n


def salted(salt: bytes, adapter: str) -> bytes:
    """The salt of computations with the adapter of this key; without an adapter `salt` itself."""
    return blake2b(salt, key=adapter.encode()).digest() if adapter else salt


def _block_hashes(ids: NDArray[np.int64], salt: bytes) -> tuple[int, ...]:
    hashes, last = [], hash(salt)
    for start in range(0, len(ids) - HASH_BLOCK + 1, HASH_BLOCK):
        last = hash((last, ids[start : start + HASH_BLOCK].tobytes()))
        hashes.append(last)
    return tuple(hashes)


@dataclass(slots=True, eq=False)
class SequenceKV:
    """The KV cache of one sequence: its content, how many tokens are computed and allocated.

    running: a request writes to it; otherwise it is cached. Its memory is `contiguous`, owned by
    the runner, or `blocks` of the paged cache. chunked_length: tokens computed in whole prefill
    chunks, if the scheduler has a chunk size.
    """

    key: CacheKey
    length: int = 0
    capacity: int = 0
    running: bool = True
    contiguous: ContiguousKV | None = None
    blocks: list[int] = field(default_factory=list)
    chunked_length: int = 0


class PrefixMatch(NamedTuple):
    """The best source of a prefix: `cached` tokens now, `pending` once running prefills end."""

    source: SequenceKV | None
    cached: int
    pending: int


class PrefixCache:
    """All KV memory, `total` tokens: of running sequences, and of cached ones in LRU order.

    allocator: of a paged cache. Sequences then have whole blocks, and can share their first ones.
    """

    def __init__(self, total: int, allocator: BlockAllocator | None = None) -> None:
        self.total, self.allocator = total, allocator
        self.used = 0
        self.running: set[SequenceKV] = set()
        self.idle: OrderedDict[SequenceKV, None] = OrderedDict()
        self.pinned: set[SequenceKV] = set()  # copy sources of the step being scheduled
        self._index: dict[int, list[SequenceKV]] = {}

    def find(self, key: CacheKey, limit: int) -> PrefixMatch:
        """The longest common prefix of at most `limit` tokens: found by hash, compared by
        content.
        """
        candidates: list[SequenceKV] = []
        for block_hash in key.block_hashes:
            if not (sequences := self._index.get(block_hash)):
                break
            candidates = sequences
        best = PrefixMatch(None, 0, 0)
        for kv in candidates:
            if kv.key.salt != key.salt:
                continue
            common = min(key.common_prefix(kv.key), limit)
            cached, pending = min(common, kv.length), max(best.pending, common)
            if cached > best.cached:
                best = PrefixMatch(kv, cached, pending)
            else:
                best = best._replace(pending=pending)
        return best

    def reserve(self, kv: SequenceKV, capacity: int) -> bool:
        """Allocate memory for `capacity` tokens of `kv`, evicting cached sequences as needed.

        False: there is not enough, and nothing has changed.
        """
        size = self.allocator.block_size if self.allocator else 1
        need, kept = -(-capacity // size) * size - kv.capacity, self.pinned | {kv}
        free = self.total - self.used
        if need > free:
            if need > free + self._exclusive_tokens(k for k in self.idle if k not in kept):
                return False
            while need > self.total - self.used:
                self.drop(next(k for k in self.idle if k not in kept))
        kv.capacity += need
        self.used += need
        if self.allocator:
            kv.blocks += self.allocator.allocate(need // size)
        return True

    def shareable(self, length: int) -> int:
        """Of a common prefix of `length` tokens, those in whole blocks, which need no copy."""
        size = self.allocator.block_size if self.allocator else 0
        return length // size * size if size else 0

    def share(self, kv: SequenceKV, source: SequenceKV, length: int) -> None:
        """Give a new sequence the whole blocks of the first `length` tokens of `source`."""
        if self.allocator:
            kv.capacity = self.shareable(length)
            blocks = source.blocks[: length // self.allocator.block_size]
            kv.blocks = self.allocator.share(blocks)

    @property
    def idle_tokens(self) -> int:
        """Tokens of memory that only cached sequences use."""
        return self._exclusive_tokens(self.idle)

    def _exclusive_tokens(self, sequences: Iterable[SequenceKV]) -> int:
        """Tokens of memory that these sequences use and no others."""
        if not self.allocator:
            return sum(kv.capacity for kv in sequences)
        uses = Counter(block for kv in sequences for block in kv.blocks)
        counts = self.allocator.ref_counts
        return self.allocator.block_size * sum(n == counts[block] for block, n in uses.items())

    def start(self, kv: SequenceKV) -> None:
        """`kv` has its memory and belongs to a running request from now on."""
        self.running.add(kv)
        self._register(kv)

    def reuse(self, kv: SequenceKV, key: CacheKey, length: int) -> None:
        """A cached sequence becomes a running one that begins with its first `length` tokens."""
        del self.idle[kv]
        self._unregister(kv)
        kv.key, kv.length, kv.running = key, length, True
        self.start(kv)

    def retire(self, kv: SequenceKV, key: CacheKey) -> None:
        """A running sequence ends and is cached under `key`, unless it is too short or a part of
        another one; a cached sequence that is a part of it is dropped."""
        assert len(key.ids) == kv.length
        if kv.length < HASH_BLOCK:
            self.drop(kv)
            return
        self._unregister(kv)
        kv.key = key
        other, cached, _ = self.find(key, kv.length)
        self._register(kv)
        if cached == kv.length:
            self.drop(kv)
            return
        if other is not None and other in self.idle and cached == other.length:
            self.drop(other)
        self.running.remove(kv)
        kv.running = False
        self.idle[kv] = None

    def insert(self, kv: SequenceKV) -> bool:
        """Cache a sequence computed elsewhere. False: no memory, and nothing has changed."""
        if not self.reserve(kv, kv.length):
            return False
        self.start(kv)
        self.retire(kv, kv.key)
        return True

    def drop(self, kv: SequenceKV) -> None:
        """Remove a sequence and free its memory."""
        if kv.running:
            self.running.remove(kv)
        else:
            del self.idle[kv]
        self._unregister(kv)
        self.release(kv)

    def release(self, kv: SequenceKV) -> None:
        """Free the memory of a sequence."""
        self.used -= self._exclusive_tokens([kv])
        if self.allocator:
            self.allocator.release(kv.blocks)
        kv.capacity, kv.contiguous, kv.blocks = 0, None, []

    def clear(self) -> None:
        while self.idle:
            self.drop(next(iter(self.idle)))

    def _register(self, kv: SequenceKV) -> None:
        for block_hash in kv.key.block_hashes:
            self._index.setdefault(block_hash, []).append(kv)

    def _unregister(self, kv: SequenceKV) -> None:
        for block_hash in kv.key.block_hashes:
            self._index[block_hash].remove(kv)
            if not self._index[block_hash]:
                del self._index[block_hash]

    def check(self) -> None:
        """Assert that every count is the sum over the sequences."""
        alive = [*self.running, *self.idle]
        assert self.used == self._exclusive_tokens(alive) <= self.total, (self.used, self.total)
        assert all(kv.running for kv in self.running) and not any(kv.running for kv in self.idle)
        assert all(kv.length <= kv.capacity for kv in alive)
        own = [(kv.contiguous, kv.capacity) for kv in alive]
        assert all(memory is None or memory.capacity == capacity for memory, capacity in own)
        if self.allocator:
            counts, size = self.allocator.ref_counts, self.allocator.block_size
            uses = Counter(block for kv in alive for block in kv.blocks)
            assert counts == [uses[block] for block in range(len(counts))]
            assert sorted([*self.allocator.free_blocks, *uses]) == list(range(len(counts)))
            assert all(kv.capacity == len(kv.blocks) * size for kv in alive)
        indexed = Counter(id(kv) for sequences in self._index.values() for kv in sequences)
        hashes = {id(kv): len(kv.key.block_hashes) for kv in alive if kv.key.block_hashes}
        assert indexed == Counter(hashes)
