"""Lines of workers on the driver's screen: ours and unknown ones are shown, Ray's narration is not."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
from ray._private import worker as ray_worker

from raydistill.driver.worker_lines import HOOK, _Shown, lines_to_show, worker_lines

OURS = {"pid": 7, "actor_name": "RayTrainWorker", "is_err": False}

# As Ray 2.60 sent them during runs of the miniature world.
NARRATION = [
    OURS
    | {
        "is_err": True,
        "lines": ["[2026-11-27 22:13:27,672 E 24650 25231] core_worker.cc:2465: Actor with class name: x"],
    },
    {
        "pid": 9,
        "actor_name": "ServeController",
        "is_err": True,
        "lines": ["WARNING … -- Deployment 'T' has 1 replicas"],
    },
    {
        "pid": 9,
        "actor_name": "TrainController",
        "is_err": True,
        "lines": ["Failed to send resource request", "Traceback"],
    },
    {
        "pid": "raylet",
        "is_err": False,
        "lines": ["Task ServeController.listen_for_change failed. There are infinite retries remaining, so …"],
    },
    {"pid": "autoscaler", "is_err": False, "lines": ["======== Autoscaler status ========", "Node status", ""]},
    {
        "pid": "raylet",
        "lines": ["[2026-11-27 22:13:27,672 I 5 5] (raylet) worker_pool.cc:7: memory of idle workers is fine"],
    },
    {"pid": "raylet", "lines": ["[2026-11-27 22:13:27,672 W 5 5] (raylet) worker_pool.cc:7: a namespace is new"]},
    {
        "pid": "raylet",
        "lines": [
            "[2026-11-27 22:13:27,672 E 5 5] (raylet) node_manager.cc:3: 0 Workers (tasks / actors) killed due to memory "
            "pressure (OOM), 2 Workers crashed due to other reasons at node (ID: 0a, IP: 10.0.0.1) over the last time period.",
            "",
            "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/x.html.",
        ],
    },
    OURS | {"lines": ["", "   "]},
]


@pytest.mark.parametrize("data", NARRATION, ids=lambda data: data["lines"][0][:30])
def test_ray_s_narration_stays_in_its_log_files(data):
    assert lines_to_show(data) == []


def test_what_concerns_people_is_shown():
    assert lines_to_show(OURS | {"lines": ["distill: the student is worse"]}) == ["distill: the student is worse"]
    unknown = OURS | {"is_err": True, "lines": ["free(): invalid pointer"]}
    assert lines_to_show(unknown) == ["(RayTrainWorker 7) free(): invalid pointer"]
    event = {"pid": "autoscaler", "is_err": False, "lines": [":event_summary:Adding 1 node(s) of type worker."]}
    assert lines_to_show(event) == ["(autoscaler) Adding 1 node(s) of type worker."]
    killed = {"pid": "raylet", "is_err": False, "lines": ["1 Workers (tasks / actors) killed due to memory pressure"]}
    assert lines_to_show(killed) == ["(raylet) 1 Workers (tasks / actors) killed due to memory pressure"]


PREFIX = "[2026-11-27 22:13:27,672 {} 5 5] (raylet) node_manager.cc:3: "


@pytest.mark.parametrize(
    ("level", "text"),
    [
        ("E", "2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to other reasons"),
        ("E", "Worker killer did not select any workers to kill even though memory usage is high."),
        ("E", "/tmp/ray/session_1 is over 95% full, available space: 1.2 GB; capacity: 64 GB"),
        ("W", "Plasma fallback allocator failed, likely out of disk space."),
        ("C", "Check failed: a != b"),
    ],
)
def test_a_node_that_is_short_of_memory_or_disk_or_dies_is_heard(level, text):
    data = {"pid": "raylet", "is_err": False, "lines": [PREFIX.format(level) + text]}
    assert lines_to_show(data) == [f"(raylet) {text}"]


def test_a_warning_of_a_replica_is_shown():
    text = "WARNING 2026-11-27 22:13:27,672 mine_Teacher x1 -- request took 70 s"
    data = {"pid": 3, "actor_name": "ServeReplica:mine:Teacher", "is_err": True}
    assert lines_to_show(data | {"lines": [text, text.replace("WARNING", "INFO")]}) == [
        f"(ServeReplica:mine:Teacher 3) {text}"
    ]


def test_where_ray_s_function_is_another_that_is_said(monkeypatch, capsys):
    def another(data):
        raise AssertionError

    monkeypatch.setattr(ray_worker, HOOK, another)
    with worker_lines():
        assert getattr(ray_worker, HOOK) is another
    assert f"has another {HOOK}: all that Ray's processes print is shown" in capsys.readouterr().out
    monkeypatch.delattr(ray_worker, HOOK)
    with worker_lines():
        assert not hasattr(ray_worker, HOOK)
    assert f"has another {HOOK}" in capsys.readouterr().out


def test_workers_that_say_the_same_are_heard_once(capsys):
    shown = _Shown()
    for pid in (1, 2, 1):
        shown(OURS | {"pid": pid, "lines": ["prompts are cut"]})
    shown(OURS | {"pid": 2, "lines": ["something else"]})
    said = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["prompts are cut", "prompts are cut", "something else"]  # twice by the process that said it first


def test_ray_has_the_function_that_this_replaces():
    """Where a newer Ray lacks it, Ray's own printing returns, and this test says so."""
    assert list(inspect.signature(getattr(ray_worker, HOOK)).parameters) == ["data", "ignore_prefix"]


PROGRAM = """
import time, ray, sys
from raydistill.driver.cluster import connected

@ray.remote(num_cpus=0)
class RayTrainWorker:
    def speak(self):
        print("a line of ours", flush=True)
        print("[2026-11-27 22:13:27,672 E 1 2] core_worker.cc:2465: narration", file=sys.stderr, flush=True)
        print("nobody knows this", file=sys.stderr, flush=True)

with connected(num_cpus=1):
    ray.get(RayTrainWorker.remote().speak.remote())
    time.sleep(3)
"""


@pytest.mark.full
def test_a_cluster_of_our_own_prints_not_one_line_that_is_not_ours():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = sorted(line.partition(" ")[2] for line in done.stdout.splitlines())
    assert first.startswith("(RayTrainWorker ")
    assert first.endswith(") nobody knows this")
    assert second == "a line of ours"
