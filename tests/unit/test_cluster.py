"""The cluster that a job starts for itself, and what it keeps off the screen."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from raydistill.driver.cluster import DASHBOARD_PORT, REPORTS, TALKATIVE, WITHOUT_DASHBOARD, quiet

# what Ray Train's cleaner asks once a second
ASK = """
import ray
from raydistill.driver.cluster import connected
with connected():
    @ray.remote(num_cpus=0)
    def ask():
        from ray.util.state import get_actor
        from ray.util.state.exception import RayStateApiException
        try:
            get_actor("ab" * 16, timeout=10)
        except RayStateApiException as error:
            return str(error)
    print("answer", ray.get(ask.remote()))
"""

# a line of a rank that our code did not write
TELL = """
import sys
import time
import ray
from raydistill.benchmark.idle import IdleRank
from raydistill.driver.cluster import connected
from raydistill.teachers.shard import actor
with connected(num_cpus=1):
    rank = actor(IdleRank).remote(1, 2, "teacher-mine/x1y2z3")
    ray.get(rank.describe.remote())
    ray.get(rank.__ray_call__.remote(lambda self: print("a line", file=sys.stderr, flush=True)))
    time.sleep(2)  # Ray reads its logs twice a second
"""


@pytest.mark.full
@pytest.mark.timeout(120)
def test_a_line_of_a_teacher_rank_says_which_replica_and_rank_it_comes_from():
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, env=environment)
    line = r"\(TeacherRank teacher-mine/x1y2z3 1/2 \d+\) a line\n"
    assert re.search(line, ended.stdout), ended.stdout + ended.stderr


@pytest.mark.timeout(120)
@pytest.mark.full
def test_workers_of_an_own_cluster_ask_no_dashboard_that_they_happen_to_find():
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment)
    (address,) = WITHOUT_DASHBOARD.values()
    assert f"answer Failed to make request to {address}/" in ended.stdout, ended.stdout + ended.stderr


# the dashboard's page, and what a worker is told when it asks there
LOOK = """
import urllib.request
import ray
from raydistill.driver.cluster import connected
with connected(dashboard=True, num_cpus=1):
    @ray.remote(num_cpus=0)
    def ask():
        import os
        from ray.util.state import get_actor
        address = os.environ["RAY_API_SERVER_ADDRESS"]
        return address, urllib.request.urlopen(address).status, get_actor("ab" * 16, timeout=30)
    print("answer", ray.get(ask.remote()))
"""


@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_cluster_of_our_own_has_a_dashboard_on_wish_and_says_where_also_when_the_usual_port_is_taken():
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # then another program has it already
            other.bind(("127.0.0.1", DASHBOARD_PORT))
            other.listen()
        ended = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=environment)
    said = re.search(r"dashboard (http://127\.0\.0\.1:(\d+)) ", ended.stdout)
    assert said, ended.stdout + ended.stderr
    assert int(said[2]) != DASHBOARD_PORT
    assert f"answer ('{said[1]}', 200, None)" in ended.stdout, ended.stdout + ended.stderr


def test_notes_are_kept_off_the_screen_whatever_level_their_owners_set_and_warnings_are_not():
    reports = Path(ray.__file__).parent / REPORTS
    assert "getLogger(__file__)" in reports.read_text()
    names = (*TALKATIVE, str(reports), "DeepSpeed")
    before = {name: list(logging.getLogger(name).filters) for name in names}

    def shown(name: str, level: int, text: str) -> bool:
        return bool(logging.getLogger(name).filter(logging.LogRecord(name, level, "", 0, text, (), None)))

    try:
        quiet()
        for name in names[:-1]:
            logging.getLogger(name).setLevel(logging.INFO)
            assert not shown(name, logging.INFO, "a note")
            assert shown(name, logging.WARNING, "a warning")
        assert not shown("DeepSpeed", logging.WARNING, "Setting accelerator to CPU. If you have GPU …")
        assert shown("DeepSpeed", logging.WARNING, "another warning")
    finally:
        for name, filters in before.items():
            logging.getLogger(name).filters[:] = filters
