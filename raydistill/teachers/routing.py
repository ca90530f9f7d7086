"""Which replica a request goes to: the one with the fewest requests under way.

Serve's own router compares two replicas picked at random, so that some idle while others queue. Serve ships this module
by value to every process that sends requests: nothing else of this package may be imported here.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

FRESH_S = 0.25  # how long what replicas said of other callers' requests holds
SILENT_S = 5.0  # for how long one that did not answer is not asked again before others' requests are sent
SETTLE_S = 0.01  # Serve counts an answer as given some milliseconds after the caller has it


class LeastBusyRouter(FIFOMixin, RequestRouter):
    """Compares all replicas; losses, full replicas and cancelled requests are the base classes' matter.

    Callers that ask at the same moment see the same queues. Each may say with its requests where it begins among equally
    busy replicas: `place`, 0 <= place < 1. Trainers in lockstep that begin at equal distances do not meet. Others begin
    at random.
    """

    max_num_routing_tasks_cap = 1  # one request after the other: each sees where those before it went
    queue_len_response_deadline_s = 0.5  # replicas on a busy machine are not silent yet at Serve's 0.1 s

    def initialize_state(self) -> None:
        self._sent: Counter[ReplicaID] = Counter()  # requests of this handle under way
        self._others: Counter[ReplicaID] = Counter()  # and of other callers, when replicas were asked last
        self._silent: dict[ReplicaID, float] = {}  # those that did not answer then, and until when they are left alone
        self._asked = float("-inf")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, the least busy first; the silent ones last and together, for the base class to ask again."""
        if pending_request:
            pending_request.routing_context.should_backoff = True  # while none can be reached, or all are full
        await asyncio.sleep(0)  # meanwhile the request before this one is sent, and counted
        if len(candidate_replicas) > 1:
            if time.monotonic() - self._asked > FRESH_S:
                await self._ask(candidate_replicas)
            if all(map(self._length, candidate_replicas)):  # it would only queue
                await asyncio.sleep(SETTLE_S)
        place = pending_request.kwargs.get("place") if pending_request else None
        place = random.random() if place is None else place
        first = int(len(candidate_replicas) * place + 1e-9)  # 3 · (1/3) may fall short of 1
        replicas = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        replicas = sorted(replicas[first:] + replicas[:first], key=self._length)
        silent = [replica for replica in replicas if replica.replica_id in self._silent]
        return [*([replica] for replica in replicas if replica not in silent), silent]

    async def _ask(self, replicas: list[RunningReplica]) -> None:
        """Learn how many requests of other callers each replica has."""
        now, ids = time.monotonic(), {replica.replica_id for replica in replicas}
        self._silent = {replica: until for replica, until in self._silent.items() if until > now and replica in ids}
        self._sent = Counter({replica: count for replica, count in self._sent.items() if replica in ids})
        sent = self._sent.copy()  # what is answered while they are asked is no other caller's
        asked = [replica for replica in replicas if replica.replica_id not in self._silent]
        lengths = {replica.replica_id: length for replica, length in await self._probe_queue_lens(asked, 0)}
        self._asked = time.monotonic()
        self._silent |= {replica: self._asked + SILENT_S for replica, length in lengths.items() if length is None}
        self._others = Counter({replica: max(0, (length or 0) - sent[replica]) for replica, length in lengths.items()})

    def _length(self, replica: RunningReplica) -> int:
        """Requests under way."""
        return self._sent[replica.replica_id] + self._others[replica.replica_id]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._sent[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._sent[replica_id] = max(0, self._sent[replica_id] - 1)  # one that could not be sent is completed too
