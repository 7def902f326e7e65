"""The count of launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_launches: ContextVar[Counter[str] | None] = ContextVar("launches", default=None)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Counts the launches of each kernel in this context, on the meta device too."""
    counts: Counter[str] = Counter()
    token = _launches.set(counts)
    try:
        yield counts
    finally:
        _launches.reset(token)


def counted(name: str, x: Tensor) -> bool:
    """Count a launch; whether the count is all, since `x` is on the meta device."""
    if (counts := _launches.get()) is not None:
        counts[name] += 1
    return x.is_meta
