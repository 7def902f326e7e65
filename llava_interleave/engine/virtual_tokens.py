"""Fairness between clients: virtual token counters, saved steps. Knows no request and no model."""

from __future__ import annotations

from collections import Counter


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


class SavedSteps:
    """Steps in which a client is preferred: one for each step without it, up to `limit`.

    So short requests take about as long as without a client that always has requests. One is spent
    in each step with it; a client that has not been seen has `limit`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._step = 0
        self._saved: dict[str, int] = {}
        self._left: dict[str, int] = {}  # the step when its last request ended
        self._requests: Counter[str] = Counter()

    def enter(self, client: str, weight: float) -> None:
        """A request of `client` has arrived. One with a `weight` below 1 saves up less."""
        if client not in self._requests:
            saved = {one: self._saved[one] + self._step - step for one, step in self._left.items()}
            self._saved[client] = min(
                int(self.limit * min(1, weight)), saved.pop(client, self.limit)
            )
            self._left.pop(client, None)
            for other in (one for one, steps in saved.items() if steps >= self.limit):
                del self._saved[other], self._left[other]
        self._requests[client] += 1

    def leave(self, client: str) -> None:
        """A request of `client` has ended."""
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client]
            self._left[client] = self._step

    def next(self) -> set[str]:
        """The clients that are preferred in the next step; none where all would be."""
        self._step += 1
        preferred = {client for client in self._requests if self._saved[client]}
        for client in preferred:
            self._saved[client] -= 1
        return preferred if len(preferred) < len(self._requests) else set()
