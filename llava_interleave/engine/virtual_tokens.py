"""Fairness between clients: virtual token counters, saved time. Knows no request and no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class VirtualTokenCounters:
    """What has been computed for each client, in tokens divided by its weight: least comes first.

    This is the VTC of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
    arXiv:2401.00588). A client that comes back starts no lower than those that are there: time
    without requests is not saved up.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._requests: Counter[str] = Counter()  # unfinished ones of each client

    def __getitem__(self, client: str) -> float:
        return self._tokens[client]

    @property
    def num_clients(self) -> int:
        """Clients with unfinished requests."""
        return len(self._requests)

    @property
    def several(self) -> bool:
        """Whether there has been another client since the engine was idle."""
        return len(self._tokens) > 1

    def enter(self, client: str) -> None:
        """A request of `client` has arrived."""
        if client not in self._requests:
            lowest = min((self._tokens[other] for other in self._requests), default=0.0)
            if not self._requests:  # the machine was idle: no client has waited
                self._tokens.clear()
            self._tokens = {
                other: tokens
                for other, tokens in self._tokens.items()
                if other in self._requests or tokens > lowest
            }
            self._tokens[client] = max(self._tokens.get(client, 0.0), lowest)
        self._requests[client] += 1

    def leave(self, client: str) -> None:
        """A request of `client` has ended."""
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client]

    def charge(self, client: str, tokens: float) -> None:
        self._tokens[client] += tokens


class SavedTime:
    """Seconds for which a client is preferred: those without requests of it, up to `limit`.

    So short requests take about as long as without a client that always has requests. A step with
    it costs its time; a client that has not been seen has `limit`.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._now = 0.0
        self._saved: dict[str, float] = {}
        self._left: dict[str, float] = {}  # when its last request ended
        self._requests: Counter[str] = Counter()

    def enter(self, client: str, weight: float, now: float) -> None:
        """A request of `client` has arrived. One with a `weight` below 1 saves up less."""
        self._now = max(self._now, now)
        if client not in self._requests:
            saved = {one: self._saved[one] + self._now - at for one, at in self._left.items()}
            limit = self.limit * min(1, weight)
            self._saved[client] = min(limit, saved.pop(client, self.limit))
            self._left.pop(client, None)
            for other in (one for one, seconds in saved.items() if seconds >= self.limit):
                del self._saved[other], self._left[other]
        self._requests[client] += 1

    def leave(self, client: str) -> None:
        """A request of `client` has ended."""
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client]
            self._left[client] = self._now

    def preferred(self) -> set[str]:
        """The clients that are preferred now; none where all would be."""
        preferred = {client for client in self._requests if self._saved[client] > 0}
        return preferred if len(preferred) < len(self._requests) else set()

    def spend(self, seconds: float, clients: Iterable[str], now: float) -> None:
        """A step with requests of these clients has taken so long, until now."""
        self._now = max(self._now, now)
        for client in set(clients):
            if self._saved[client] > 0:
                self._saved[client] -= seconds
