"""The router's choice among replicas that are slow, silent or dead; no cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import ReplicaID

from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.routing import LeastBusyRouter

DEPLOYMENT = DeploymentID("teacher", "app")


class Replica:
    """Says how long its queue is, or nothing."""

    max_ongoing_requests = 1000

    def __init__(self, name: str, length: int | None = 0) -> None:
        self.replica_id, self.length, self.asked = ReplicaID(name, DEPLOYMENT), length, 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        if self.length is None:
            await asyncio.sleep(60)
        return self.length


def router_of(replicas):
    router = LeastBusyRouter(DEPLOYMENT, DeploymentHandleSource.PROXY)
    router.initialize_state()
    router.queue_len_response_deadline_s = 0.05
    return router


def request(place: float | None = None):
    return SimpleNamespace(kwargs={"place": place}, routing_context=SimpleNamespace(should_backoff=False))


def names(ranked) -> list[list[str]]:
    return [[replica.replica_id.unique_id for replica in group] for group in ranked]


def test_the_least_busy_is_first_and_the_silent_are_last_and_left_alone_for_a_while():
    async def choose():
        replicas = [Replica("a", 3), Replica("b", None), Replica("c", 1), Replica("d", 2)]
        router = router_of(replicas)
        for _ in range(3):
            router._probed_at = float("-inf")  # what they said does not hold any longer
            found = names(await router.choose_replicas(replicas, request(0.0)))
            assert found == [["c"], ["d"], ["a"], ["b"]]
        assert [replica.asked for replica in replicas] == [3, 1, 3, 3]
        router._probed_at = float("-inf")
        router._silent = {replica: 0.0 for replica in router._silent}
        replicas[1].length = 0
        assert names(await router.choose_replicas(replicas, request(0.0)))[0] == ["b"]

    asyncio.run(choose())


def test_serve_may_wait_between_its_attempts():
    async def choose():
        asked = request()
        await router_of([]).choose_replicas([Replica("a", None)], asked)
        assert asked.routing_context.should_backoff

    asyncio.run(choose())


def test_own_requests_count_at_once_and_never_below_none():
    async def choose():
        replicas = [Replica("a"), Replica("b")]
        router = router_of(replicas)
        a, b = (replica.replica_id for replica in replicas)
        assert names(await router.choose_replicas(replicas, request(0.0)))[0] == ["a"]
        router.on_send_request(a)
        assert names(await router.choose_replicas(replicas, request(0.0)))[0] == ["b"]
        router.on_request_completed(a, "first")
        for _ in range(3):
            router.on_request_completed(b, "could not be sent")
        assert names(await router.choose_replicas(replicas, request(0.0)))[0] == ["a"]
        router.on_send_request(a)
        router._probed_at = float("-inf")
        await router.choose_replicas([Replica("b"), Replica("c")], request(0.0))  # a is gone
        assert a not in router._own

    asyncio.run(choose())


@pytest.mark.parametrize("replicas", [*range(1, 33), 128])
def test_trainers_at_equal_distances_begin_at_replicas_of_their_own(replicas):
    async def choose():
        router, candidates = router_of([]), [Replica(f"{i:03}") for i in range(replicas)]
        for world in range(1, 2 * replicas + 1):
            first = [
                names(await router.choose_replicas(candidates, request(rank / world)))[0][0] for rank in range(world)
            ]
            counts = Counter(first)
            assert max(counts.values()) == -(-world // replicas)

    asyncio.run(choose())


@pytest.mark.parametrize("position", [-0.1, 1.0])
def test_a_position_outside_is_refused_where_it_is_given(position):
    with pytest.raises(ValueError, match="position must be at least 0 and below 1"):
        TeacherClient("teacher", TeacherServiceConfig(), position)
