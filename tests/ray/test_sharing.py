"""What runs that share a teacher owe each other: a turn in time, and no harm by a crash. Ranks sleep instead of computing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import ray

from raydistill.benchmark.idle import idle_service, request_of
from raydistill.config.networks import TeacherServiceConfig

pytestmark = pytest.mark.timeout(300)
CONFIG = TeacherServiceConfig(shards=2, cpus_per_rank=0.1, start_timeout_s=200, request_timeout_s=8.0, retry_for_s=8.0)
NAME = "teacher-idle"

# a run of its own that asks for more than its share, and waits
GREEDY = """
import sys
import ray
from raydistill.benchmark.idle import request_of
from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers.client import TeacherClient
ray.init(address=sys.argv[1], log_to_driver=False)
client = TeacherClient("teacher-idle", TeacherServiceConfig.model_validate_json(sys.argv[2]))
pending = [client.submit(request_of(200_000)) for _ in range(20)]
pending[0].result()
print("asked", flush=True)
for answer in pending:
    answer.result()
"""


@pytest.fixture(scope="module")
def idle(ray_cluster):
    """A running service whose ranks sleep for a second a request."""
    with idle_service(CONFIG, NAME) as running:
        running.set(1.0)
        yield running


@pytest.fixture
def greedy(idle):
    """The process of another run with many requests under way, one of which is answered."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", GREEDY, address, CONFIG.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "asked\n"
        yield process
    finally:
        process.kill()
        process.wait()


def requests(client) -> int:
    """That the first rank has begun to work on."""
    return client.describe()[0]["requests"]


def pids(client) -> set[int]:
    return {rank["pid"] for rank in client.describe()}


@pytest.mark.full
def test_a_queue_longer_than_request_timeout_is_answered_to_its_end_and_what_is_cancelled_leaves_it(idle):
    client = idle.client()
    before = requests(client)
    pending = [client.submit(request_of(1000)) for _ in range(10)]
    for answer in pending:
        answer.result()
    assert requests(client) - before == 10
    assert client.metrics()["teachers/repeated"] == 0

    first, second, third = (client.submit(request_of(1000)) for _ in range(3))
    time.sleep(0.3)
    second._response.cancel()
    first.result(), third.result()
    assert requests(client) - before == 12


@pytest.mark.full
def test_a_greedy_run_costs_another_one_turn_and_its_crash_nothing(idle, greedy):
    client = idle.client()
    before, ranks = requests(client), pids(client)
    client.submit(request_of(1000)).result()
    assert requests(client) - before <= 3  # what was under way (and what came between the two lines), and its own

    greedy.send_signal(signal.SIGKILL)
    greedy.wait()
    before = requests(client)
    for _ in range(3):
        client.submit(request_of(1000)).result()
    assert pids(client) == ranks
    assert client.metrics()["teachers/repeated"] == 0
