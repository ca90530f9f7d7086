"""Nodes on which workers fail again and again, and on them alone: workers go to others, where others have room.

A GPU with broken memory, a driver that is too old, a network card without a way: such a node fails, and the run would end
for it. Ray Train's controller asks its callbacks for the labels of workers' nodes whenever it starts workers. So a node is
left out by its id, until the controller ends.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback

from raydistill.teachers import placement

LABEL = "ray.io/node-id"  # of every node, by Ray
ON_NODE = "on node "  # what a note of an error begins with
FREED_WITHIN_S = 10.0  # the resources of workers that were ended


def name_node(error: BaseException) -> None:
    """Note on an error which node it arose on. The note travels with it to Ray Train's controller."""
    node, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
    error.add_note(f"{ON_NODE}{node}: {host} ({ray.util.get_node_ip_address()})")


def node_of(error: BaseException) -> tuple[str, str] | None:
    """(id, name) of the node of an error that says so."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(ON_NODE)]
    return tuple(notes[-1].removeprefix(ON_NODE).split(": ", 1)) if notes else None


def follows_from_others(error: BaseException) -> bool:
    """Whether a worker only says that it has lost another one."""
    cause = getattr(error, "cause", None) or error
    return isinstance(cause, torch.distributed.DistError) or "gloo" in str(cause) or "has not come" in str(cause)


@dataclass
class LeftOutNodes(ControllerCallback):
    """Of one stage, in Ray Train's controller, which asks it whenever it starts workers.

    Args:
        limit: failures in a row of one node alone, without a new update; below 1: no node is ever left out.
        need: what a worker needs, and the labels of its node.

    Attributes:
        ids: of nodes that workers avoid.
        tell: takes a line for people.
    """

    limit: int
    need: placement.Need
    ids: list[str] = field(default_factory=list, init=False)
    tell: Callable[[str], None] = field(default=print, init=False)
    _last: tuple[str, int] = field(default=("", 0), init=False)  # a node, and its failures in a row

    def failed(self, errors: dict[int, Exception], begins: bool) -> None:
        """Take note of a failure of some workers.

        Args:
            errors: by rank.
            begins: whether an update was done since the failure before.
        """
        nodes = {node[0] for error in errors.values() if not follows_from_others(error) and (node := node_of(error))}
        if self.limit < 1 or len(nodes) != 1:
            self._last = ("", 0)
            return
        node = nodes.pop()
        count = 1 if begins or node != self._last[0] else self._last[1] + 1
        self._last = (node, count)
        if count >= self.limit and node not in self.ids:
            self.ids.append(node)

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Ray Train calls this when no worker lives. Returns the labels of their nodes; None: as they are configured."""
        if not self.ids:
            return None
        text = (
            f"failures in a row on node {', '.join(map(_named, self.ids))} alone "
            f"(distill.max_failures_of_node={self.limit})"
        )
        if not self._others_have_room(num_workers):
            self.tell(f"{text}; no other has room for {num_workers} worker(s), so they go on there")
            return None
        self.tell(f"{text}; workers go on without it")
        return {**self.need.labels, LABEL: f"!in({','.join(self.ids)})"}

    def _others_have_room(self, count: int) -> bool:
        """Whether so many workers fit the other nodes, once the resources of those before are free; or a node may come."""
        wanted, deadline = [self.need.amounts] * count, time.monotonic() + FREED_WITHIN_S
        while not placement.autoscaler_present():
            nodes = [node for node in placement.labelled_nodes(self.need.labels) if node["NodeID"] not in self.ids]
            free = available_resources_per_node()
            if placement.take_room(wanted, [dict(free.get(node["NodeID"], {})) for node in nodes]):
                return True
            never = not placement.take_room(wanted, [dict(node["Resources"]) for node in nodes])
            if never or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True


def _named(node: str) -> str:
    """Its host and address, as people know it, and its id."""
    found: dict[str, Any] = next((entry for entry in ray.nodes() if entry["NodeID"] == node), {})
    return f"{found.get('NodeManagerHostname', 'unknown')} ({found.get('NodeManagerAddress', '')}, {node[:12]})"
