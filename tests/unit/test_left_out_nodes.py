"""Which node workers go on without: one that fails alone, again and again, where others have room."""

from __future__ import annotations

import pytest
import torch
from ray.train import ScalingConfig

from raydistill.teachers.placement import Need
from raydistill.workers import left_out_nodes
from raydistill.workers.left_out_nodes import LABEL, PLACED, LeftOutNodes

BAD, GOOD, THIRD = "a" * 56, "b" * 56, "c" * 56
SPOT = {"role": "trainer"}


class Cluster:
    """Nodes of two CPUs and a placement group of workers with one each; `free` is what nobody has."""

    def __init__(self, monkeypatch):
        self.free, self.held, self.grows = {GOOD: 2.0}, {}, False
        monkeypatch.setattr(left_out_nodes, "available_resources_per_node", lambda: self.per_node())
        monkeypatch.setattr(left_out_nodes, "placement_group_table", lambda: {"group": self.table()})
        monkeypatch.setattr(left_out_nodes.placement, "autoscaler_present", lambda: self.grows)
        monkeypatch.setattr(left_out_nodes.placement, "labelled_nodes", self.labelled)
        monkeypatch.setattr(left_out_nodes.ray, "nodes", lambda: [{"NodeID": BAD, "NodeManagerHostname": "h1"}])

    def per_node(self):
        return {node: {"CPU": much} for node, much in self.free.items()}

    def table(self):
        return {"bundles": dict.fromkeys(self.held, {"CPU": 1.0}), "bundles_to_node_id": self.held}

    def labelled(self, labels):
        assert labels == SPOT
        return [{"NodeID": node} for node in (BAD, GOOD, THIRD)]


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def nodes(count=2, limit=2):
    return LeftOutNodes(limit, Need("train workers", count, {"CPU": 1.0}, "keys", SPOT))


def failed(node=BAD, text="ECC", kind=RuntimeError):
    error = kind(text)
    if node:
        error.add_note(f"{PLACED}{node} group")
    return error


def scaling():
    return ScalingConfig(num_workers=2, label_selector=dict(SPOT))


def test_two_failures_in_a_row_of_one_node_have_workers_avoid_it(cluster):
    watch, labels = nodes(), scaling()
    assert watch.failed({0: failed()}, labels, begins=True) is None
    assert watch.failed({0: failed(GOOD)}, labels, begins=False) is None, "of another node"
    assert watch.failed({0: failed()}, labels, begins=False) is None
    assert watch.failed({1: failed()}, labels, begins=True) is None, "an update was done"
    assert labels.label_selector == SPOT
    said = watch.failed({0: failed()}, labels, begins=False)
    assert said.startswith(f"2 failures in a row on node h1 (, {BAD[:12]}) alone (distill.max_failures_of_node=2)")
    assert said.endswith("; workers go on without it")
    assert labels.label_selector == {**SPOT, LABEL: f"!in({BAD})"}
    cluster.free[THIRD] = 2.0
    for _ in range(2):
        watch.failed({0: failed(GOOD)}, labels, begins=False)
    assert labels.label_selector == {**SPOT, LABEL: f"!in({BAD},{GOOD})"}


def test_who_has_only_lost_another_worker_blames_no_node(cluster):
    watch, labels = nodes(), scaling()
    lost = torch.distributed.DistBackendError("NCCL error: remote process exited")
    closed = failed(GOOD, "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    lost.add_note(f"{PLACED}{GOOD} group")
    for begins in (True, False):
        watch.failed({0: lost, 1: failed(), 2: closed}, labels, begins)
    assert LABEL in labels.label_selector
    watch, labels = nodes(), scaling()
    for errors in ({0: failed(), 1: failed(GOOD)}, {0: failed(None)}, {0: lost}):  # two nodes, a process that died
        for _ in range(3):
            assert watch.failed(errors, labels, begins=False) is None
    assert labels.label_selector == SPOT


@pytest.mark.parametrize(
    ("free", "held", "grows", "leaves"),
    [
        ({GOOD: 1.0}, {}, False, False),
        ({GOOD: 1.0}, {0: BAD, 1: BAD}, False, False),
        ({GOOD: 1.0}, {0: BAD, 1: GOOD}, False, True),  # the workers' own place there is theirs again
        ({GOOD: 0.6, THIRD: 1.4}, {}, False, False),  # each needs one whole on its node
        ({}, {}, True, True),
    ],
)
def test_others_must_have_room_for_the_fewest_workers(cluster, free, held, grows, leaves):
    cluster.free, cluster.held, cluster.grows = free, held, grows
    watch, labels = nodes(), scaling()
    watch.failed({0: failed()}, labels, begins=True)
    said = watch.failed({0: failed()}, labels, begins=False)
    assert said.endswith(
        "workers go on without it" if leaves else "no other has room for the workers, so they go on there"
    )
    assert (LABEL in labels.label_selector) == leaves


def test_none_is_none(cluster):
    watch, labels = nodes(limit=-1), scaling()
    assert [watch.failed({0: failed()}, labels, begins=False) for _ in range(5)] == [None] * 5
