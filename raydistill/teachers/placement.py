"""Whether teachers and other actors fit the nodes of this cluster, and if not, why."""

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

from raydistill.config.networks import TeacherServiceConfig
from raydistill.errors import StageFailed

COORDINATOR_CPUS = 0.01
ROOM_PATIENCE_S = 60.0  # how long actors may wait for resources where no node can be added


def bundles(config: TeacherServiceConfig) -> list[dict[str, float]]:
    """Placement-group bundles of one replica: the coordinator's first, then one for each rank."""
    rank = {"CPU": config.cpus_per_rank} | ({"GPU": config.gpus_per_rank} if config.gpus_per_rank else {})
    return [{"CPU": COORDINATOR_CPUS}, *(dict(rank) for _ in range(config.shards))]


def label_selectors(config: TeacherServiceConfig) -> list[dict[str, str]] | None:
    """For each bundle, the labels that its node must have; None: any node will do."""
    return [dict(config.node_labels) for _ in bundles(config)] if config.node_labels else None


def fits(config: TeacherServiceConfig) -> bool:
    """Whether all replicas would fit the current nodes if nothing else ran on them."""
    nodes = [dict(node["Resources"]) for node in labelled_nodes(config.node_labels)]
    coordinator, rank, *_ = bundles(config)
    return take_room([rank] * (config.shards * config.replicas) + [coordinator] * config.replicas, nodes)


def strategy(config: TeacherServiceConfig) -> str:
    """How Ray places a replica's ranks: STRICT_PACK, all on one node, where ranks gather weights from each other (zero3) and
    the free resources of nodes hold every replica whole; else PACK, as few nodes as there is room on.
    """
    if config.plain or config.shards == 1:
        return "PACK"
    free = available_resources_per_node()
    nodes = [dict(free.get(node["NodeID"], {})) for node in labelled_nodes(config.node_labels)]
    return "STRICT_PACK" if whole_on_nodes(config, nodes) else "PACK"


def whole_on_nodes(config: TeacherServiceConfig, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether each replica finds all of its resources on one node.

    Args:
        nodes: free resources of each.
    """
    each: dict[str, float] = {}
    for bundle in bundles(config):
        for kind, much in bundle.items():
            each[kind] = each.get(kind, 0.0) + much
    return take_room([each] * config.replicas, [dict(node) for node in nodes])


def labelled_nodes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of `ray.nodes()` that are alive and have all of these labels."""
    return [node for node in ray.nodes() if node["Alive"] and labels.items() <= (node.get("Labels") or {}).items()]


def take_room(wanted: Iterable[Mapping[str, float]], nodes: Sequence[dict[str, float]]) -> bool:
    """Place each of the wanted amounts on the first node that has them all. False: one of them fits no node.

    `nodes`, the free resources of each node, are reduced by what was placed.
    """
    for amounts in wanted:
        node = next((n for n in nodes if all(n.get(kind, 0) >= much - 1e-6 for kind, much in amounts.items())), None)
        if node is None:
            return False
        for kind, much in amounts.items():
            node[kind] = node.get(kind, 0) - much
    return True


@dataclass(frozen=True)
class Need:
    """Equal actors. Each must find all of its resources on one node."""

    what: str  # for the message, such as "train workers"
    count: int
    amounts: Mapping[str, float]  # resources of one actor
    keys: str  # settings that change count or amounts, for the message
    labels: Mapping[str, str] = field(default_factory=dict)  # that the nodes must have


def wait_for_room(needs: Callable[[], Sequence[Need]]) -> None:
    """Wait until all of these actors fit the free resources. Returns at once where an autoscaler can add nodes.

    Ray Train and Ray Data would wait for ever. `needs` is called before every check.

    Raises StageFailed: they do not fit within ROOM_PATIENCE_S.
    """
    deadline = time.monotonic() + ROOM_PATIENCE_S
    while not autoscaler_present():
        free = available_resources_per_node()
        nodes = [(node.get("Labels") or {}, dict(free.get(node["NodeID"], {}))) for node in labelled_nodes({})]
        if (problem := lacking(needs(), nodes)) is None:
            return
        if time.monotonic() > deadline:
            raise StageFailed(problem)
        time.sleep(1)


def lacking(needs: Sequence[Need], nodes: Sequence[tuple[Mapping[str, str], dict[str, float]]]) -> str | None:
    """Place the needs in order, and describe the first that does not fit; None: all of them fit.

    Args:
        nodes: labels and free resources of each node.
    """
    for need in needs:
        fitting = [free for labels, free in nodes if need.labels.items() <= labels.items()]
        free_text = "; ".join(
            f"{_floor(free.get('CPU', 0))} CPU and {_floor(free.get('GPU', 0))} GPU" for free in fitting
        )
        placed = 0
        while placed < need.count and take_room([need.amounts], fitting):
            placed += 1
        if placed < need.count:
            each = " + ".join(f"{much:g} {kind}" for kind, much in need.amounts.items() if much)
            labels = ", ".join(f"{key}={value}" for key, value in need.labels.items())
            return (
                f"{need.what} cannot be placed: asked for {need.count} of {each} each, room for {placed}; free on the "
                f"{len(fitting)} node(s){f' labelled {labels}' if labels else ''}: {free_text or 'nothing'}. Lower {need.keys}"
                f"{', change the labels' if labels else ''}, or add nodes"
            )
    return None


def requested_against_available(config: TeacherServiceConfig) -> str:
    """What the service requests, what the cluster has, and what to change. For an error message."""
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
    """Two decimals at most, rounded down: an error message must not promise more than is free."""
    return f"{math.floor(amount * 100) / 100:g}"


def groups(name: str) -> list[str]:
    """States of the placement groups of the service `name`, without those that are removed."""
    prefix = f"SERVE_REPLICA::{name}#"
    table = placement_group_table().values()
    return [group["state"] for group in table if group["name"].startswith(prefix) and group["state"] != "REMOVED"]


def autoscaler_present() -> bool:
    """Whether an autoscaler can add nodes.

    An autoscaler gives nodes a group label, or it reports node types. Without one, Ray reports every node as a type of its
    own, `node_<id>`.
    """
    if any("ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes()):
        return True
    status = _internal_kv_get("__autoscaling_status")
    types = json.loads(status).get("autoscaler_report", {}).get("active_nodes", {}) if status else {}
    return any(not re.fullmatch(r"node_[0-9a-f]+", node_type) for node_type in types)
