"""What is kept for later: keys and values of token prefixes, features of images. Account and policy; KV tensors lie elsewhere."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from .kv_contiguous import ContiguousKV

HASH_BLOCK = 32
"""Tokens a step of the hash chain; a shorter common prefix is not worth a copy."""


class MediaId:
    """Stands for one media key; alive as long as something that was made from it. `number` is never given twice."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True, slots=True, eq=False)
class CacheKey:
    """What each token of a sequence stands for: its id, or for a placeholder a negative number from (image, offset).

    chain: hash of the salt and of all tokens up to the end of each whole block.
    """

    numbers: NDArray[np.int64]
    salt: bytes
    images: tuple[MediaId, ...]
    chain: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        images: Iterable[tuple[int, int, MediaId]] = (),
        salt: bytes = b"",
    ) -> CacheKey:
        """`images`: (index of the first placeholder, number of placeholders, identity)."""
        numbers, held = np.array(tokens, dtype=np.int64), []
        for start, length, identity in images:
            numbers[start : start + length] = -1 - (identity.number << 24) - np.arange(length)
            held.append(identity)
        return cls(numbers, salt, tuple(held), _chain(numbers, salt))

    def through(self, tokens: Sequence[int], length: int) -> CacheKey:
        """The first `length` of these keys followed by `tokens`."""
        if not tokens and length == len(self.numbers):
            return self
        numbers = np.concatenate([self.numbers, np.array(tokens, dtype=np.int64)])[:length]
        return CacheKey(numbers, self.salt, self.images, _chain(numbers, self.salt))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(index of the first placeholder, number of placeholders, number of the identity) of each image, in order."""
        at = np.flatnonzero(self.numbers < 0)
        whose, offsets = np.divmod(-1 - self.numbers[at], 1 << 24)
        first = np.flatnonzero(offsets == 0)
        lengths = np.diff(first, append=len(at))
        yield from zip(at[first].tolist(), lengths.tolist(), whose[first].tolist(), strict=True)

    def common(self, other: CacheKey) -> int:
        """How many tokens both begin with."""
        n = min(len(self.numbers), len(other.numbers))
        differ = self.numbers[:n] != other.numbers[:n]
        first = int(differ.argmax()) if n else 0
        return first if n and differ[first] else n


def salted(salt: bytes, adapter: str) -> bytes:
    """The salt of what is computed through the adapter of this key; of the network alone `salt` itself."""
    return blake2b(salt, key=adapter.encode()).digest() if adapter else salt


def _chain(numbers: NDArray[np.int64], salt: bytes) -> tuple[int, ...]:
    chain, link = [], hash(salt)
    for start in range(0, len(numbers) - HASH_BLOCK + 1, HASH_BLOCK):
        link = hash((link, numbers[start : start + HASH_BLOCK].tobytes()))
        chain.append(link)
    return tuple(chain)


@dataclass(slots=True, eq=False)
class SequenceKV:
    """Keys and values of one token sequence: what they stand for, how many are computed, how many have room.

    running: some request writes to it; else it is kept as a cache. slab: where they lie, the runner's affair; or blocks: those of
    a pool where they do. whole: how many of the first were computed in whole pieces of a prompt, where a scheduler has such.
    """

    keys: CacheKey
    length: int = 0
    capacity: int = 0
    running: bool = True
    slab: ContiguousKV | None = None
    blocks: list[int] = field(default_factory=list)
    whole: int = 0


class Match(NamedTuple):
    """The best source for a prefix: `usable` tokens now, and the most that any will have once it is prefilled."""

    source: SequenceKV | None
    usable: int
    coming: int


class BlockAllocator:
    """The blocks of a pool, each of `size` tokens: which are free, and how many sequences have each of the others."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.free = list(range(count))
        self.holders = [0] * count

    def take(self, count: int) -> list[int]:
        return self.share([self.free.pop() for _ in range(count)])

    def share(self, blocks: list[int]) -> list[int]:
        for block in blocks:
            self.holders[block] += 1
        return blocks

    def give(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.append(block)


class PrefixCache:
    """The account of all KV memory, `total` tokens: running sequences, and finished ones as cache, oldest dropped first.

    pages: where it is a pool of blocks. A sequence has whole ones then, and its first may be others' too.
    """

    def __init__(self, total: int, pages: BlockAllocator | None = None) -> None:
        self.total, self.pages = total, pages
        self.used = 0
        self.running: set[SequenceKV] = set()
        self.idle: OrderedDict[SequenceKV, None] = OrderedDict()
        self.pinned: set[SequenceKV] = set()  # sources of the step being planned
        self._index: dict[int, list[SequenceKV]] = {}

    def find(self, keys: CacheKey, limit: int) -> Match:
        """Who shares the longest prefix of at most `limit` tokens; found by hash, measured by content."""
        holders: list[SequenceKV] = []
        for link in keys.chain:
            if not (at := self._index.get(link)):
                break
            holders = at
        best = Match(None, 0, 0)
        for kv in holders:
            if kv.keys.salt != keys.salt:
                continue
            common = min(keys.common(kv.keys), limit)
            usable, coming = min(common, kv.length), max(best.coming, common)
            best = (
                Match(kv, usable, coming) if usable > best.usable else best._replace(coming=coming)
            )
        return best

    def reserve(self, kv: SequenceKV, capacity: int) -> bool:
        """Give `kv` room for `capacity` tokens, dropping caches as needed. False, and nothing happened: there is no room."""
        size = self.pages.size if self.pages else 1
        need, kept = -(-capacity // size) * size - kv.capacity, self.pinned | {kv}
        if need > self.total - self.used:
            if need > self.total - self.used + self._alone(k for k in self.idle if k not in kept):
                return False
            while need > self.total - self.used:
                self.drop(next(k for k in self.idle if k not in kept))
        kv.capacity += need
        self.used += need
        if self.pages:
            kv.blocks += self.pages.take(need // size)
        return True

    def shared(self, length: int) -> int:
        """How many of so many tokens that two sequences begin with need no copy: those of whole blocks."""
        return length // self.pages.size * self.pages.size if self.pages else 0

    def share(self, kv: SequenceKV, source: SequenceKV, length: int) -> None:
        """Give a new sequence the blocks of `source` in which its first `length` tokens are whole."""
        if self.pages:
            kv.capacity = self.shared(length)
            kv.blocks = self.pages.share(source.blocks[: length // self.pages.size])

    @property
    def idle_tokens(self) -> int:
        """What would be free without the caches."""
        return self._alone(self.idle)

    def _alone(self, kvs: Iterable[SequenceKV]) -> int:
        """Tokens of memory that these sequences have and no others."""
        if not self.pages:
            return sum(kv.capacity for kv in kvs)
        held = Counter(block for kv in kvs for block in kv.blocks)
        return self.pages.size * sum(
            count == self.pages.holders[block] for block, count in held.items()
        )

    def start(self, kv: SequenceKV) -> None:
        """`kv` has its room and belongs to a running request from here on."""
        self.running.add(kv)
        self._register(kv)

    def take(self, kv: SequenceKV, keys: CacheKey, length: int) -> None:
        """A cache becomes a running sequence that begins with its first `length` tokens."""
        del self.idle[kv]
        self._unregister(kv)
        kv.keys, kv.length, kv.running = keys, length, True
        self.start(kv)

    def retire(self, kv: SequenceKV, keys: CacheKey) -> None:
        """A running sequence ends and becomes a cache for `keys`, unless it is too short or another holds all of it;
        a cache that it holds all of goes."""
        assert len(keys.numbers) == kv.length
        if kv.length < HASH_BLOCK:
            self.drop(kv)
            return
        self._unregister(kv)
        kv.keys = keys
        other, usable, _ = self.find(keys, kv.length)
        self._register(kv)
        if usable == kv.length:
            self.drop(kv)
            return
        if other is not None and other in self.idle and usable == other.length:
            self.drop(other)
        self.running.remove(kv)
        kv.running = False
        self.idle[kv] = None

    def insert(self, kv: SequenceKV) -> bool:
        """Make a cache of a sequence that was computed elsewhere. False, and nothing happened: there is no room."""
        if not self.reserve(kv, kv.length):
            return False
        self.start(kv)
        self.retire(kv, kv.keys)
        return True

    def drop(self, kv: SequenceKV) -> None:
        """Forget a sequence and free its memory."""
        if kv.running:
            self.running.remove(kv)
        else:
            del self.idle[kv]
        self._unregister(kv)
        self.release(kv)

    def release(self, kv: SequenceKV) -> None:
        """Take all its room from a sequence."""
        self.used -= self._alone([kv])
        if self.pages:
            self.pages.give(kv.blocks)
        kv.capacity, kv.slab, kv.blocks = 0, None, []

    def clear(self) -> None:
        while self.idle:
            self.drop(next(iter(self.idle)))

    def _register(self, kv: SequenceKV) -> None:
        for link in kv.keys.chain:
            self._index.setdefault(link, []).append(kv)

    def _unregister(self, kv: SequenceKV) -> None:
        for link in kv.keys.chain:
            self._index[link].remove(kv)
            if not self._index[link]:
                del self._index[link]

    def check(self) -> None:
        """Assert that every count is what the sequences add up to."""
        alive = [*self.running, *self.idle]
        assert self.used == self._alone(alive) <= self.total, (self.used, self.total)
        assert all(kv.running for kv in self.running) and not any(kv.running for kv in self.idle)
        assert all(kv.length <= kv.capacity for kv in alive)
        assert all(kv.slab is None or kv.slab.capacity == kv.capacity for kv in alive)
        if self.pages:
            held = Counter(block for kv in alive for block in kv.blocks)
            assert self.pages.holders == [held[block] for block in range(len(self.pages.holders))]
            assert sorted([*self.pages.free, *held]) == list(range(len(self.pages.holders)))
            assert all(kv.capacity == len(kv.blocks) * self.pages.size for kv in alive)
        indexed = Counter(id(kv) for holders in self._index.values() for kv in holders)
        assert indexed == Counter({id(kv): len(kv.keys.chain) for kv in alive if kv.keys.chain})


class EncoderCache:
    """Features `[tokens, D]` by unit, least recently used dropped first, at most `limit` bytes beside those that are held."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._rows: OrderedDict[tuple[bytes, int], Tensor] = OrderedDict()
        self._holds: Counter[tuple[bytes, int]] = Counter()

    def __contains__(self, key: tuple[bytes, int]) -> bool:
        return key in self._rows

    def __getitem__(self, key: tuple[bytes, int]) -> Tensor:
        self._rows.move_to_end(key)
        return self._rows[key]

    def put(self, key: tuple[bytes, int], rows: Tensor) -> None:
        assert key not in self._rows
        self._rows[key] = rows
        self.bytes += rows.nbytes
        self._trim()

    def hold(self, key: tuple[bytes, int]) -> None:
        """Keep these features, once they are there, until as many `release`."""
        self._holds[key] += 1

    def release(self, key: tuple[bytes, int]) -> None:
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]
            self._trim()

    def clear(self) -> None:
        limit, self.limit = self.limit, 0
        self._trim()
        self.limit = limit

    def _trim(self) -> None:
        if self.bytes > self.limit:
            for key in [key for key in self._rows if key not in self._holds]:
                self.bytes -= self._rows.pop(key).nbytes
                if self.bytes <= self.limit:
                    break

    def check(self, holds: Counter[tuple[bytes, int]]) -> None:
        """Assert the bytes, and that `holds` are the holds there are."""
        assert self.bytes == sum(rows.nbytes for rows in self._rows.values())
        assert self.bytes <= self.limit + sum(
            rows.nbytes for key, rows in self._rows.items() if key in holds
        )
        assert self._holds == holds, (self._holds, holds)
