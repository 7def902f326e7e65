"""Fair shares between API keys: rates, places and threads. Knows no HTTP and no model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .api_errors import ApiError

T = TypeVar("T")
NICENESS = 5
"""Of pool threads and their children, on Linux, above that of the process: decoding media must not
slow down the engine. Not more: one that has the interpreter's lock and gets no core stops them all.
"""
MAX_BUCKETS = 10_000
"""Keys or addresses that a rate limit knows at a time."""


class RateLimit:
    """A token bucket for each key: `per_minute` requests or tokens, which may be charged later."""

    def __init__(self, per_minute: int, unit: str = "requests") -> None:
        self.per_minute, self.unit = per_minute, unit
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str, now: float, amount: int = 1) -> None:
        """Charge `amount`. Raises ApiError while the key's bucket has less than one."""
        if (level := self._level(key, now)) < 1:
            wait = 1 + int((1 - level) * 60 / self.per_minute)
            message = f"more than {self.per_minute} {self.unit} a minute; try again in {wait} s"
            raise ApiError(429, "rate_limit_exceeded", message, retry=wait)
        self.charge(key, now, amount)

    def allows(self, key: str) -> bool:
        """Whether `take` would be allowed now."""
        return self._level(key, time.monotonic()) >= 1

    def charge(self, key: str, now: float, amount: float) -> None:
        """Charge `amount`, also below zero."""
        if len(self._buckets) >= MAX_BUCKETS:
            known = {
                key: bucket
                for key, bucket in self._buckets.items()
                if self._level(key, now) < self.per_minute
            }
            self._buckets = known if len(known) < MAX_BUCKETS // 2 else {}
        self._buckets[key] = self._level(key, now) - amount, now

    def _level(self, key: str, now: float) -> float:
        level, since = self._buckets.get(key, (float(self.per_minute), now))
        return min(self.per_minute, level + (now - since) * self.per_minute / 60)


class Shares:
    """How much of `total` each key has. No key takes more than it leaves free for the others.

    So one key alone has at most half, and a key that has nothing always gets something.
    is_exclusive: whether there is only one key now, which may have all.
    """

    def __init__(self, total: int, is_exclusive: Callable[[], bool]) -> None:
        self.total, self.is_exclusive = total, is_exclusive
        self._used: Counter[str] = Counter()

    @property
    def used(self) -> int:
        return self._used.total()

    @property
    def largest(self) -> int:
        """What one key has at most."""
        return self.total if self.is_exclusive() else self.total // 2

    def fits(self, key: str, amount: int) -> bool:
        """Whether `amount` more would leave the other keys their share; always, if exclusive."""
        free = self.total - self.used - amount
        return self.is_exclusive() or self._used[key] + amount <= free

    def add(self, key: str, amount: int) -> None:
        """Take or, if negative, give back."""
        self._used[key] += amount
        if not self._used[key]:
            del self._used[key]

    def of(self, key: str) -> int:
        return self._used[key]


class FairThreadPool:
    """Threads that keys share: free threads go to the key with the fewest running.

    One thread more than `threads` is reserved for keys of which nothing runs. Use it from one event
    loop only.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads, self.name = threads, name
        self._pool = ThreadPoolExecutor(threads + 1, name, initializer=_lower_priority)
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._starts: dict[int, float] = {}
        self._lock = threading.Lock()

    async def run(self, key: str, function: Callable[[], T]) -> T:
        """The result of blocking work. Cancelling does not end work that has started."""
        loop = asyncio.get_running_loop()
        await self._acquire(key, loop)
        future = self._pool.submit(self._timed, function)

        def done(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._release, key)

        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def longest(self) -> float:
        """Seconds that the longest running work has taken so far, if no thread is free; else 0."""
        with self._lock:
            starts = list(self._starts.values())
        return time.monotonic() - min(starts) if len(starts) >= self.threads else 0.0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, function: Callable[[], T]) -> T:
        thread = threading.get_ident()
        with self._lock:
            self._starts[thread] = time.monotonic()
        try:
            return function()
        finally:
            with self._lock:
                del self._starts[thread]

    def _may_start(self, key: str) -> bool:
        return self._running.total() < self.threads + (not self._running[key])

    async def _acquire(self, key: str, loop: asyncio.AbstractEventLoop) -> None:
        if key not in self._waiting and self._may_start(key):
            self._running[key] += 1
            return
        turn = loop.create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(key)
            raise

    def _release(self, key: str) -> None:
        self._running[key] -= 1
        for waiting in sorted(self._waiting, key=lambda other: self._running[other]):
            turns = self._waiting[waiting]
            while turns and turns[0].cancelled():
                turns.popleft()
            while turns and self._may_start(waiting):
                self._running[waiting] += 1
                # The key with the fewest running comes first again at the next release.
                turns.popleft().set_result(None)
                break
            if not turns:
                del self._waiting[waiting]


def _lower_priority() -> None:
    if sys.platform == "linux":  # there it is of this thread alone
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
