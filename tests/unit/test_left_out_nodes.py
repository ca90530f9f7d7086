"""Which node workers go on without: one that fails alone, again and again, where others have room."""

from __future__ import annotations

import pytest
import ray
import torch

from raydistill.teachers.placement import Need
from raydistill.workers import left_out_nodes
from raydistill.workers.left_out_nodes import LABEL, ON_NODE, LeftOutNodes
from raydistill.workers.no_progress import NODES_FILE, NoProgress

BAD, GOOD, THIRD = "a" * 56, "b" * 56, "c" * 56
SPOT = {"role": "trainer"}


class Cluster:
    """Of three nodes: their free CPUs."""

    def __init__(self, monkeypatch):
        self.free, self.grows = {GOOD: 2.0}, False
        per_node = {"available_resources_per_node": lambda: {node: {"CPU": much} for node, much in self.free.items()}}
        for name, replacement in (per_node | {"FREED_WITHIN_S": 0.0}).items():
            monkeypatch.setattr(left_out_nodes, name, replacement)
        monkeypatch.setattr(left_out_nodes.placement, "autoscaler_present", lambda: self.grows)
        monkeypatch.setattr(left_out_nodes.placement, "labelled_nodes", self.labelled)
        monkeypatch.setattr(left_out_nodes.ray, "nodes", lambda: [{"NodeID": BAD, "NodeManagerHostname": "h1"}])

    def labelled(self, labels):
        assert labels == SPOT
        return [{"NodeID": node, "Resources": {"CPU": 2.0}} for node in (BAD, GOOD, THIRD)]


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


@pytest.fixture
def watch(cluster):
    watch = LeftOutNodes(2, Need("train workers", 2, {"CPU": 1.0}, "keys", SPOT))
    watch.told = []
    watch.tell = watch.told.append
    return watch


def failed(node=BAD, text="ECC", kind=RuntimeError):
    error = kind(text)
    if node:
        error.add_note(f"{ON_NODE}{node}: host (address)")
    return error


def labels(watch, count=2):
    return watch.on_controller_start_worker_group(scaling_config=None, num_workers=count)


def test_two_failures_in_a_row_of_one_node_have_workers_avoid_it(cluster, watch):
    for error, begins in ((failed(), True), (failed(GOOD), False), (failed(), False), (failed(), True)):
        watch.failed({0: error}, begins)  # another node's in between, or an update
        assert labels(watch) is None
    watch.failed({1: failed()}, begins=False)
    assert labels(watch) == {**SPOT, LABEL: f"!in({BAD})"}
    (said,) = watch.told
    assert said.startswith(f"failures in a row on node h1 (, {BAD[:12]}) alone (distill.max_failures_of_node=2)")
    assert said.endswith("; workers go on without it")
    cluster.free[THIRD] = 2.0
    for _ in range(2):
        watch.failed({0: failed(GOOD)}, begins=False)
    assert labels(watch) == {**SPOT, LABEL: f"!in({BAD},{GOOD})"}


def test_who_has_only_lost_another_worker_blames_no_node(watch):
    lost = failed(GOOD, "NCCL error: remote process exited", torch.distributed.DistBackendError)
    closed = failed(GOOD, "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    for errors in ({0: failed(), 1: failed(GOOD)}, {0: failed(None)}, {0: lost}):  # two nodes, a process that died
        for _ in range(3):
            watch.failed(errors, begins=False)
    assert labels(watch) is None
    for begins in (True, False):
        watch.failed({0: lost, 1: failed(), 2: closed}, begins)
    assert watch.ids == [BAD]


@pytest.mark.parametrize(
    ("free", "grows", "leaves"),
    [
        ({GOOD: 1.0, BAD: 2.0}, False, False),
        ({GOOD: 0.6, THIRD: 1.4}, False, False),  # each needs one whole on its node
        ({GOOD: 1.0, THIRD: 1.0}, False, True),
        ({}, True, True),
    ],
)
def test_others_must_have_room_for_all_workers(cluster, watch, free, grows, leaves):
    cluster.free, cluster.grows = free, grows
    for _ in range(2):
        watch.failed({0: failed()}, begins=False)
    assert (labels(watch) is not None) == leaves
    room = "workers go on without it" if leaves else "no other has room for 2 worker(s), so they go on there"
    assert watch.told[0].endswith(room)


def test_none_is_none(watch):
    watch.limit = -1
    for _ in range(5):
        watch.failed({0: failed()}, begins=False)
    assert labels(watch) is None


def test_ray_train_copies_what_counts_and_what_is_asked_together(watch, tmp_path):
    """Both are callbacks of one list: what one learns in the controller the other one tells."""
    counts = NoProgress("distill", str(tmp_path), "progress.json", -1, nodes=watch)
    counts, asked = ray.cloudpickle.loads(ray.cloudpickle.dumps([counts, watch]))
    for _ in range(2):
        counts.after_exception(None, {0: failed()})
    assert asked.ids == [BAD]
    asked.tell("said")
    assert (tmp_path / NODES_FILE).read_text() == "said"
