"""Settings of the server's process: its heap, and how threads take turns in the interpreter."""

from __future__ import annotations

import asyncio
import ctypes
import sys

M_ARENA_MAX = -8
"""glibc's malloc.h: the maximum number of arenas."""
SWITCH_INTERVAL = 0.00005
"""Seconds for which a thread may keep the interpreter's lock from the others. The engine gives it
up around each operator, and with Python's 5 ms waits that long for each next to a busy thread."""
TRIM_SECONDS = 10.0
"""Seconds between two times that free memory goes back to the system."""


def tune_process() -> None:
    """Prepare this process for a server; call it before threads start."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    use_single_malloc_arena()


def use_single_malloc_arena() -> bool:
    """Let all threads share one malloc arena, and return whether the C library can.

    glibc gives each thread an arena, and a thread does not use the free memory of another's arena:
    memory grows with traffic. docs/decisions.md has the figures.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False


def trim_heap() -> bool:
    """Give free memory of the heap back to the system; whether the C library can.

    glibc does so by itself at the heap's end only: what one small block above keeps stays resident.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False


async def trim_heap_regularly() -> None:
    """Until it is cancelled."""
    while True:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(trim_heap)
