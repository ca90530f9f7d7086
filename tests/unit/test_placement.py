"""Whether amounts of resources find room on nodes."""

from __future__ import annotations

import pytest

from raydistill.config.networks import TeacherServiceConfig
from raydistill.teachers.placement import Need, lacking, strategy, take_room, whole_on_nodes


@pytest.mark.parametrize(
    ("wanted", "nodes", "fits"),
    [
        ([{"CPU": 4}] * 2, [{"CPU": 4.0}, {"CPU": 4.0}], True),
        ([{"CPU": 4}] * 2, [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 3.0}], False),  # enough in all, but on no node
        ([{"CPU": 1, "GPU": 0.5}] * 3, [{"CPU": 8.0, "GPU": 1.0}], False),
        ([{"CPU": 1, "GPU": 0.5}] * 2 + [{"CPU": 1}], [{"CPU": 3.0, "GPU": 1.0}], True),
        ([{"CPU": 1, "GPU": 0.5}] * 2 + [{"CPU": 1}], [{"CPU": 2.0, "GPU": 1.0}], False),  # a reader beside them
        ([{"CPU": 0.2, "GPU": 0}], [{"CPU": 0.2}], True),
        ([{"CPU": 0.1}] * 3, [{"CPU": 0.3}], True),  # whatever the rounding
        ([{"CPU": 1}], [], False),
    ],
)
def test_each_amount_needs_one_node_that_has_it_all(wanted, nodes, fits):
    assert take_room(wanted, nodes) is fits


def test_what_does_not_fit_is_said_with_what_would():
    workers = Need("train workers", 3, {"CPU": 2, "GPU": 1}, "distill.workers", {"role": "trainer"})
    encoders = Need("text encoders", 2, {"CPU": 1, "GPU": 0}, "prompts.encoders")

    def nodes(cpus: float, gpus: float):
        return [({"role": "trainer"}, {"CPU": cpus, "GPU": gpus}), ({"role": "teacher"}, {"CPU": 8.0, "GPU": 8.0})]

    assert lacking([workers, encoders], nodes(6, 3)) is None
    assert lacking([workers, encoders], nodes(6, 2)) == (
        "train workers cannot be placed: asked for 3 of 2 CPU + 1 GPU each, room for 2; free on the 1 node(s) labelled "
        "role=trainer: 6 CPU and 2 GPU. Lower distill.workers, change the labels, or add nodes"
    )
    full = [({"role": "trainer"}, {"CPU": 7.5, "GPU": 3.0})]
    assert lacking([workers, encoders], full) == (
        "text encoders cannot be placed: asked for 2 of 1 CPU each, room for 1; free on the 1 node(s): 1.5 CPU and 0 GPU. "
        "Lower prompts.encoders, or add nodes"
    )


@pytest.mark.parametrize(
    ("config", "nodes", "whole"),
    [
        ({"shards": 2, "replicas": 2}, [{"CPU": 3.0, "GPU": 2.0}] * 2, True),
        ({"shards": 2, "replicas": 2}, [{"CPU": 9.0, "GPU": 4.0}], True),
        ({"shards": 2, "replicas": 2}, [{"CPU": 9.0, "GPU": 3.0}, {"CPU": 9.0, "GPU": 1.0}], False),  # enough in all
        ({"shards": 4, "replicas": 1}, [{"CPU": 9.0, "GPU": 2.0}] * 2, False),
        ({"shards": 2, "replicas": 1}, [{"CPU": 2.0, "GPU": 2.0}], False),  # no room for the coordinator
    ],
)
def test_a_replica_stays_on_one_node_where_every_replica_can(config, nodes, whole):
    assert whole_on_nodes(TeacherServiceConfig(cpus_per_rank=1, gpus_per_rank=1, **config), nodes) is whole


def test_ranks_that_never_meet_need_not_be_on_one_node():
    for other in ({"backend": "plain", "shards": 4}, {"backend": "zero3", "shards": 1}):
        assert strategy(TeacherServiceConfig(**other)) == "PACK"
