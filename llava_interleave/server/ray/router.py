"""Session affinity: which replica gets a request.

Ray loads this module in the gateway; it knows no HTTP and no model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionAffinityRouter(ConsistentHashRouter):  # type: ignore[misc]  # ray has no types here
    """Ray's consistent hashing: requests of one session go to one replica, also after scaling.

    A replica with `target` running requests passes further ones to the next replica on the ring, so
    that popular media spread over as many replicas as they need. Where all are over the target, the
    least loaded multiple comes first.
    """

    def initialize_state(self, *, target: int) -> None:
        super().initialize_state(num_fallback_replicas=10_000)  # all of them
        self.target = target
        # Ray's own cache of it expires after ten seconds.
        self.running: Counter[Any] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        # Stable: replicas with the same load stay in the ring's order.
        return sorted(ranks, key=lambda rank: self.running[rank[0].replica_id] // self.target)

    def on_send_request(self, replica_id: Any) -> None:
        super().on_send_request(replica_id)
        self.running[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        # Ray also calls this for requests that could not be sent.
        self.running[replica_id] = max(0, self.running[replica_id] - 1)
