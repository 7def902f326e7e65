"""Fairness between clients: virtual token counters. Knows no request and no model."""

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
