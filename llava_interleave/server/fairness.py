"""Fair shares between API keys: rates, places and threads. Knows no HTTP and no model."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from .api_errors import ApiError

T = TypeVar("T")
NICENESS, BUSY_NICENESS = 5, 10
"""Of pool threads, on Linux, above that of the process: decoding media must not slow down the
engine. The second one is of keys that were busy lately, where there are several keys.
"""
BUSY_SECONDS, FORGET_SECONDS = 2.0, 10.0
"""CPU seconds of a pool's threads with which a key is busy; after the second time they count 1/e.
"""
CHECK_SECONDS = 0.5
"""Between two looks at what the running threads have taken so far."""
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


@dataclass(slots=True)
class _Work:
    """What runs in this thread."""

    key: str
    ident: int = field(default_factory=threading.get_ident)
    thread: int = field(default_factory=threading.get_native_id)
    start: float = field(default_factory=time.monotonic)


class FairThreadPool:
    """Threads that keys share: free threads go to the key with the fewest running.

    One thread more than `threads` is reserved for keys of which nothing runs. The threads of a key
    that was busy lately get a lower priority, unless it is the only one (`is_exclusive`). Each work
    has a thread of its own, for a priority can be lowered, but raised by the superuser only. Use it
    from one event loop only.
    """

    def __init__(
        self, threads: int, name: str, is_exclusive: Callable[[], bool] = lambda: True
    ) -> None:
        self.threads, self.name, self.is_exclusive = threads, name, is_exclusive
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._works: list[_Work] = []
        self._used: dict[str, tuple[float, float]] = {}  # CPU seconds by key, and when
        self._lock = threading.Lock()

    async def run(self, key: str, function: Callable[[], T]) -> T:
        """The result of blocking work. Cancelling does not end work that has started."""
        loop = asyncio.get_running_loop()
        await self._acquire(key, loop)
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def check() -> None:
            self.lower_busy()
            timers[0] = loop.call_later(CHECK_SECONDS, check)

        def release() -> None:
            timers[0].cancel()
            self._release(key)

        def done(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(release)

        timers = [loop.call_later(CHECK_SECONDS, check)]
        future.add_done_callback(done)
        args = (key, function, future)
        threading.Thread(target=self._work, args=args, name=self.name).start()
        return await asyncio.wrap_future(future)

    def longest(self) -> float:
        """Seconds that the longest running work has taken so far, if no thread is free; else 0."""
        with self._lock:
            starts = [work.start for work in self._works]
        return time.monotonic() - min(starts) if len(starts) >= self.threads else 0.0

    def lower_busy(self) -> None:
        """Lower the priority of the threads of busy keys."""
        if sys.platform != "linux" or self.is_exclusive():
            return
        with self._lock:  # a thread that has ended may have given its number to another one
            seconds = {work.key: self._seconds(work.key) for work in self._works}
            for work in self._works:
                seconds[work.key] += time.clock_gettime(time.pthread_getcpuclockid(work.ident))
            for work in self._works:
                if seconds[work.key] >= BUSY_SECONDS:
                    _set_niceness(work.thread, BUSY_NICENESS)

    def _seconds(self, key: str) -> float:
        seconds, at = self._used.get(key, (0.0, 0.0))
        return seconds * math.exp((at - time.monotonic()) / FORGET_SECONDS)

    def _work(self, key: str, function: Callable[[], T], future: Future[T]) -> None:
        work = _Work(key)
        _set_niceness(work.thread, NICENESS)
        with self._lock:
            self._works.append(work)
        self.lower_busy()
        try:
            result: T | BaseException = function()
        except BaseException as error:  # noqa: BLE001  the caller raises it
            result = error
        with self._lock:
            self._works.remove(work)
            self._used[key] = self._seconds(key) + time.thread_time(), time.monotonic()
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

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


def _set_niceness(thread: int, niceness: int) -> None:
    """Of one thread, on Linux; never less than it has."""
    if sys.platform == "linux":  # there it is of this thread alone
        lowest = os.getpriority(os.PRIO_PROCESS, os.getpid()) + niceness
        if os.getpriority(os.PRIO_PROCESS, thread) < lowest:
            os.setpriority(os.PRIO_PROCESS, thread, lowest)
