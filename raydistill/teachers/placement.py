"""Can a teacher service be placed on this cluster, and if not, why."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group_table

from raydistill.config import Teachers

COORDINATOR_CPUS = 0.01


def bundles(config: Teachers) -> list[dict[str, float]]:
    """Placement-group bundles of one replica: the coordinator's, then one for each rank."""
    rank = {"CPU": config.cpus_per_rank} | ({"GPU": config.gpus_per_rank} if config.gpus_per_rank else {})
    return [{"CPU": COORDINATOR_CPUS}, *(dict(rank) for _ in range(config.shards))]


def label_selectors(config: Teachers) -> list[dict[str, str]] | None:
    """Labels that the node of each bundle must carry; None: any node will do."""
    return [dict(config.node_labels) for _ in bundles(config)] if config.node_labels else None


def fits(config: Teachers) -> bool:
    """Whether all replicas fit the nodes as they are, if nothing else ran on them."""
    nodes = [dict(node["Resources"]) for node in labelled_nodes(config.node_labels)]
    coordinator, rank, *_ = bundles(config)
    return place([rank] * (config.shards * config.replicas) + [coordinator] * config.replicas, nodes)


def labelled_nodes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of `ray.nodes()`: those alive that carry all of these labels."""
    wanted = labels.items()
    return [node for node in ray.nodes() if node["Alive"] and wanted <= (node.get("Labels") or {}).items()]


def free_resources(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """What is free now on each node that carries all of these labels."""
    free = available_resources_per_node()
    return [dict(free.get(node["NodeID"], {})) for node in labelled_nodes(labels)]


def place(wanted: Iterable[Mapping[str, float]], nodes: Sequence[dict[str, float]]) -> bool:
    """Whether each of the wanted amounts finds a node, the first that has it all; takes them from `nodes`."""
    for amounts in wanted:
        node = next((n for n in nodes if all(n.get(kind, 0) >= much - 1e-6 for kind, much in amounts.items())), None)
        if node is None:
            return False
        for kind, much in amounts.items():
            node[kind] = node.get(kind, 0) - much
    return True


def requested_against_available(config: Teachers) -> str:
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
