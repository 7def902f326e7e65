"""Which replica of the model takes a request. Ray loads this module in the process that asks; it knows no HTTP and no model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionAffinityRouter(ConsistentHashRouter):  # type: ignore[misc]  # ray has no types here
    """Ray's consistent hashing: requests of one session meet on a replica, also after others have come or gone.

    A replica with `enough` under way passes on what comes, to the next one on the ring: so what everybody asks about spreads to
    as many as it takes, and stays with them. Of replicas that all have enough, one with twice as much comes later, and so on.
    """

    def initialize_state(self, *, enough: int) -> None:
        super().initialize_state(num_fallback_replicas=10_000)  # all of them
        self.enough = enough
        self.under_way: Counter[Any] = (
            Counter()
        )  # Ray's own cache of it forgets after ten seconds without news

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        return sorted(
            ranks, key=lambda rank: self.under_way[rank[0].replica_id] // self.enough
        )  # equals stay in their order

    def on_send_request(self, replica_id: Any) -> None:
        super().on_send_request(replica_id)
        self.under_way[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self.under_way[replica_id] = max(
            0, self.under_way[replica_id] - 1
        )  # Ray tells of what could not be sent, too
