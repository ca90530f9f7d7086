"""Which replica a request goes to: the one with the fewest requests under way.

Serve's own router compares two replicas picked at random. So some replicas idle while others have a queue: as many
trainers as replicas reached 84 % of linear with 2 and 73 % with 4 replicas, and 99 % with this router.
Serve pickles this module by value for every process that sends requests. So it must not import the rest of this package.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

FRESH_S = 0.25  # how long the answers of a probe are used
SILENT_S = 5.0  # how long a replica that did not answer a probe is not probed again
SETTLE_S = 0.01  # Serve counts a request as completed some milliseconds after the caller has the answer


class LeastBusyRouter(FIFOMixin, RequestRouter):
    """Compares all replicas. The base classes handle lost and full replicas, and cancelled requests.

    Callers that ask at the same moment see the same queues. So each request may carry `place`, 0 <= place < 1: where it
    begins to look among equally busy replicas. Trainers in lockstep with evenly spaced ones choose different replicas.
    Requests without a place begin at random.
    """

    max_num_routing_tasks_cap = 1  # one request after the other: each sees the choices before it
    queue_len_response_deadline_s = 0.5  # Serve's 0.1 s is too short on a busy machine

    def initialize_state(self) -> None:
        self._own: Counter[ReplicaID] = Counter()  # requests of this handle under way
        self._others: Counter[ReplicaID] = Counter()  # requests of other callers, at the last probe
        self._silent: dict[ReplicaID, float] = {}  # did not answer a probe; not probed until then
        self._probed_at = float("-inf")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, the least busy first. The silent ones are the last group; the base class probes them itself."""
        if pending_request:
            pending_request.routing_context.should_backoff = True  # the base class pauses while all are silent or full
        await asyncio.sleep(0)  # lets the request before this one be sent, and counted
        if len(candidate_replicas) > 1:
            if time.monotonic() - self._probed_at > FRESH_S:
                await self._probe(candidate_replicas)
            if all(map(self._length, candidate_replicas)):  # all busy: one may be about to become free
                await asyncio.sleep(SETTLE_S)
        position = pending_request.kwargs.get("place") if pending_request else None
        position = random.random() if position is None else position
        first = int(len(candidate_replicas) * position + 1e-9)  # 3 · (1/3) may fall short of 1
        replicas = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        replicas = sorted(replicas[first:] + replicas[:first], key=self._length)
        silent = [replica for replica in replicas if replica.replica_id in self._silent]
        return [*([replica] for replica in replicas if replica not in silent), silent]

    async def _probe(self, replicas: list[RunningReplica]) -> None:
        """Ask each replica for the length of its queue, and keep what exceeds this handle's own requests."""
        now, ids = time.monotonic(), {replica.replica_id for replica in replicas}
        self._silent = {replica: until for replica, until in self._silent.items() if until > now and replica in ids}
        self._own = Counter({replica: count for replica, count in self._own.items() if replica in ids})
        own = self._own.copy()  # before the probe: own requests that end meanwhile must not count as those of others
        probed = [replica for replica in replicas if replica.replica_id not in self._silent]
        lengths = {replica.replica_id: length for replica, length in await self._probe_queue_lens(probed, 0)}
        self._probed_at = time.monotonic()
        self._silent |= {replica: self._probed_at + SILENT_S for replica, length in lengths.items() if length is None}
        self._others = Counter({replica: max(0, (length or 0) - own[replica]) for replica, length in lengths.items()})

    def _length(self, replica: RunningReplica) -> int:
        """Requests under way."""
        return self._own[replica.replica_id] + self._others[replica.replica_id]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._own[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        # Serve also completes requests that it could not send
        self._own[replica_id] = max(0, self._own[replica_id] - 1)
