"""Which replica a request goes to. Ranks sleep instead of computing."""

from __future__ import annotations

import time

import pytest
import ray

from raydistill.benchmark.idle import idle_service, request_of
from raydistill.config.networks import TeacherServiceConfig

pytestmark = pytest.mark.timeout(300)
CONFIG = TeacherServiceConfig(shards=1, cpus_per_rank=0.1, start_timeout_s=200)
REPLICAS = 4


@pytest.fixture
def idle(ray_cluster):
    """A running service whose ranks sleep for three seconds a request."""
    with idle_service(CONFIG, "teacher-routed", REPLICAS) as running:
        running.set(3.0)
        yield running


@ray.remote(num_cpus=0.1)
class Caller:
    """Another process that asks."""

    def __init__(self, client):
        self.client = client

    def ask(self, count: int, at: float) -> None:
        self.client.handle()
        time.sleep(max(0.0, at - time.time()))
        self.pending = [self.client.submit(request_of(1000)) for _ in range(count)]

    def wait(self) -> None:
        for answer in self.pending:
            answer.result()


def replicas(client) -> list[dict]:
    """What the rank of each replica says."""
    return [ranks[0] for ranks in client.handle().broadcast("describe").results(timeout_s=60)]


def requests(client) -> list[int]:
    """That each replica has worked on, or begun to."""
    return [rank["requests"] for rank in replicas(client)]


@pytest.mark.full
def test_no_replica_gets_a_second_request_before_each_has_one(idle):
    client = idle.client()
    idle.set(1.0)
    for answered in (0, 1, 2):
        pending = [client.submit(request_of(1000)) for _ in range(REPLICAS)]
        for answer in pending:
            answer.result()
        assert requests(client) == [answered + 1] * REPLICAS
    pending = [client.submit(request_of(1000)) for _ in range(3 * REPLICAS)]
    for answer in pending:
        answer.result()
    assert requests(client) == [6] * REPLICAS


@pytest.mark.full
def test_requests_of_other_processes_count(idle):
    client, other = idle.client(), Caller.remote(idle.client())
    other.ask.remote(2, at=0.0)
    while sum(requests(client)) < 2:
        time.sleep(0.05)
    pending = [client.submit(request_of(1000)) for _ in range(2)]
    for answer in pending:
        answer.result()
    ray.get(other.wait.remote())
    assert requests(client) == [1] * REPLICAS


@pytest.mark.full
def test_callers_in_lockstep_with_places_of_their_own_do_not_meet(idle):
    idle.set(1.0)
    callers = [Caller.remote(idle.client(i / REPLICAS)) for i in range(REPLICAS)]
    for answered in range(4):
        ray.get([caller.ask.remote(1, at=time.time() + (0.5 if answered else 10.0)) for caller in callers])
        ray.get([caller.wait.remote() for caller in callers])
        assert requests(idle.client()) == [answered + 1] * REPLICAS


@pytest.mark.full
def test_a_replica_that_dies_costs_no_request(idle):
    client = idle.client()
    pending = [client.submit(request_of(1000)) for _ in range(2 * REPLICAS)]
    while sum(requests(client)) < REPLICAS:
        time.sleep(0.05)
    victim = next(
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::teacher-routed#")
    )
    ray.kill(ray.get_actor(**victim))
    pending += [client.submit(request_of(1000)) for _ in range(REPLICAS)]
    for answer in pending:
        answer.result()
