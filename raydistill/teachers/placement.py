"""Can a teacher service be placed on this cluster, and if not, why."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group_table

from raydistill.config.schema import TeacherServiceConfig
from raydistill.errors import StageFailed

COORDINATOR_CPUS = 0.01
ROOM_PATIENCE_S = 60.0  # how long actors may wait for resources where no node can be added


def bundles(config: TeacherServiceConfig) -> list[dict[str, float]]:
    """Placement-group bundles of one replica: the coordinator's, then one for each rank."""
    rank = {"CPU": config.cpus_per_rank} | ({"GPU": config.gpus_per_rank} if config.gpus_per_rank else {})
    return [{"CPU": COORDINATOR_CPUS}, *(dict(rank) for _ in range(config.shards))]


def label_selectors(config: TeacherServiceConfig) -> list[dict[str, str]] | None:
    """Labels that the node of each bundle must carry; None: any node will do."""
    return [dict(config.node_labels) for _ in bundles(config)] if config.node_labels else None


def fits(config: TeacherServiceConfig) -> bool:
    """Whether all replicas fit the nodes as they are, if nothing else ran on them."""
    nodes = [dict(node["Resources"]) for node in labelled_nodes(config.node_labels)]
    coordinator, rank, *_ = bundles(config)
    return take_room([rank] * (config.shards * config.replicas) + [coordinator] * config.replicas, nodes)


def labelled_nodes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of `ray.nodes()`: those alive that carry all of these labels."""
    wanted = labels.items()
    return [node for node in ray.nodes() if node["Alive"] and wanted <= (node.get("Labels") or {}).items()]


def free_resources(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """What is free now on each node that carries all of these labels."""
    free = available_resources_per_node()
    return [dict(free.get(node["NodeID"], {})) for node in labelled_nodes(labels)]


def take_room(wanted: Iterable[Mapping[str, float]], nodes: Sequence[dict[str, float]]) -> bool:
    """Whether each of the wanted amounts finds a node, the first that has it all; takes them from `nodes`."""
    for amounts in wanted:
        node = next((n for n in nodes if all(n.get(kind, 0) >= much - 1e-6 for kind, much in amounts.items())), None)
        if node is None:
            return False
        for kind, much in amounts.items():
            node[kind] = node.get(kind, 0) - much
    return True


@dataclass(frozen=True)
class Need:
    """Equal actors, each of which must find all that it needs on one node."""

    what: str  # "train workers"
    count: int
    amounts: Mapping[str, float]
    keys: str  # settings that change the need, for the message
    labels: Mapping[str, str] = field(default_factory=dict)  # that the nodes must carry


def wait_for_room(needs: Callable[[], Sequence[Need]], patience_s: float | None = None) -> None:
    """Wait until all needs find room on the nodes as they are; where nodes may be added, Ray asks for them itself.

    Args:
        needs: asked at every look.
        patience_s: default ROOM_PATIENCE_S.

    Raises:
        StageFailed: there is still none; Ray Train and Ray Data would wait for ever.
    """
    deadline = time.monotonic() + (ROOM_PATIENCE_S if patience_s is None else patience_s)
    while not autoscaler_present():
        free = available_resources_per_node()
        nodes = [(node.get("Labels") or {}, dict(free.get(node["NodeID"], {}))) for node in labelled_nodes({})]
        if (problem := lacking(needs(), nodes)) is None:
            return
        if time.monotonic() > deadline:
            raise StageFailed(problem)
        time.sleep(1)


def lacking(needs: Sequence[Need], nodes: Sequence[tuple[Mapping[str, str], dict[str, float]]]) -> str | None:
    """What does not fit on nodes of these (labels, free resources), the first needs first; None: everything does."""
    for need in needs:
        fitting = [free for labels, free in nodes if need.labels.items() <= labels.items()]
        have = "; ".join(f"{_floor(free.get('CPU', 0))} CPU and {_floor(free.get('GPU', 0))} GPU" for free in fitting)
        placed = 0
        while placed < need.count and take_room([need.amounts], fitting):
            placed += 1
        if placed < need.count:
            each = " + ".join(f"{much:g} {kind}" for kind, much in need.amounts.items() if much)
            labels = ", ".join(f"{key}={value}" for key, value in need.labels.items())
            return (
                f"{need.what} cannot be placed: asked for {need.count} of {each} each, room for {placed}; free on the "
                f"{len(fitting)} node(s){f' labelled {labels}' if labels else ''}: {have or 'nothing'}. Lower {need.keys}"
                f"{', change the labels' if labels else ''}, or add nodes"
            )
    return None


def requested_against_available(config: TeacherServiceConfig) -> str:
    """One line for an error message."""
    per_rank = f"{config.cpus_per_rank:g} CPU" + (f" + {config.gpus_per_rank:g} GPU" if config.gpus_per_rank else "")
    ranks = config.replicas * config.shards
    total, free = ray.cluster_resources(), ray.available_resources()
    have = ", ".join(f"{_floor(free.get(kind, 0))} of {total.get(kind, 0):g} {kind} free" for kind in ("CPU", "GPU"))
    nodes = sum(node["Alive"] for node in ray.nodes())
    labels = ", ".join(f"{key}={value}" for key, value in config.node_labels.items())
    return (
        f"requested {config.replicas} replica(s) x {config.shards} rank(s) of {per_rank} = "
        f"{ranks * config.cpus_per_rank + config.replicas * COORDINATOR_CPUS:g} CPU, {ranks * config.gpus_per_rank:g} GPU; "
        f"the cluster has {have} on {nodes} node(s)"
        + (f", of which ranks may only use those labelled {labels}" if labels else "")
        + ". Lower teachers.replicas, teachers.cpus_per_rank or "
        "teachers.gpus_per_rank, or add nodes"
    )


def _floor(amount: float) -> str:
    return f"{math.floor(amount * 100) / 100:g}"


def groups(name: str) -> list[str]:
    """States of the placement groups of the service `name` that exist."""
    prefix = f"SERVE_REPLICA::{name}#"
    table = placement_group_table().values()
    return [group["state"] for group in table if group["name"].startswith(prefix) and group["state"] != "REMOVED"]


def pending_groups(name: str) -> int:
    """How many replicas of the service `name` wait for resources."""
    return sum(state in ("PENDING", "RESCHEDULING") for state in groups(name))


def autoscaler_present() -> bool:
    """Whether nodes may be added when they are asked for.

    An autoscaler gives nodes a group label, or reports node types; without one, Ray reports each node as a type of
    its own (`node_<id>`).
    """
    if any("ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes()):
        return True
    status = _internal_kv_get("__autoscaling_status")
    types = json.loads(status).get("autoscaler_report", {}).get("active_nodes", {}) if status else {}
    return any(not re.fullmatch(r"node_[0-9a-f]+", node_type) for node_type in types)
