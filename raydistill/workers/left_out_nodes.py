"""Nodes on which workers fail again and again, and on them alone: workers go to others, where others have room.

A GPU with broken memory, a driver that is too old, a network card without a way: such a node fails, and the run would end
for it. Ray Train asks its `ScalingConfig` for the labels of workers' nodes whenever it starts workers. So a node is left out
by its id, until the controller ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.train import ScalingConfig
from ray.util.placement_group import placement_group_table

from raydistill.teachers import placement

LABEL = "ray.io/node-id"  # of every node, by Ray
PLACED = "placed on "  # what a note of an error begins with


def name_place(error: BaseException) -> None:
    """Note on an error its node's id, and the placement group of all workers. The note travels with it."""
    group = ray.util.get_current_placement_group()
    error.add_note(f"{PLACED}{ray.get_runtime_context().get_node_id()} {group.id.hex() if group else ''}")


def place_of(error: BaseException) -> tuple[str, str] | None:
    """(id of its node, id of the placement group) of an error that says so."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(PLACED)]
    if not notes:
        return None
    node, _, group = notes[-1].removeprefix(PLACED).partition(" ")
    return node, group


def follows_from_others(error: BaseException) -> bool:
    """Whether a worker only says that it has lost another one."""
    cause = getattr(error, "cause", None) or error
    return isinstance(cause, torch.distributed.DistError) or "gloo" in str(cause) or "has not come" in str(cause)


@dataclass
class LeftOutNodes:
    """Of one stage, in Ray Train's controller.

    Args:
        limit: failures in a row of one node alone, without a new update; below 1: no node is ever left out.
        need: the fewest workers that will do, and what each of them needs.
    """

    limit: int
    need: placement.Need
    ids: list[str] = field(default_factory=list, init=False)
    _last: tuple[str, int] = field(default=("", 0), init=False)  # a node, and its failures in a row

    def failed(self, errors: dict[int, Exception], scaling: ScalingConfig, begins: bool) -> str | None:
        """Take note of a failure of some workers; leave a node out where it is time.

        Args:
            errors: by rank.
            scaling: of the workers; its labels are changed.
            begins: whether an update was done since the failure before.

        Returns:
            a line for people, where there is something to say.
        """
        places = {place for error in errors.values() if not follows_from_others(error) and (place := place_of(error))}
        if self.limit < 1 or len(places) != 1:
            self._last = ("", 0)
            return None
        node, group = places.pop()
        count = 1 if begins or node != self._last[0] else self._last[1] + 1
        self._last = (node, count)
        if count < self.limit:
            return None
        self._last = ("", 0)
        told = f"{count} failures in a row on node {_named(node)} alone (distill.max_failures_of_node={self.limit})"
        if not self._others_have_room(node, group):
            return f"{told}; no other has room for the workers, so they go on there"
        self.ids.append(node)
        labels = scaling.label_selector or {}
        scaling.label_selector = {**labels, LABEL: f"!in({','.join(self.ids)})"}
        return f"{told}; workers go on without it"

    def _others_have_room(self, node: str, group: str) -> bool:
        """Whether the fewest workers fit other nodes, beside all that is there but themselves; or a node may come."""
        if placement.autoscaler_present():
            return True
        free = available_resources_per_node()
        others = {
            entry["NodeID"]: dict(free.get(entry["NodeID"], {}))
            for entry in placement.labelled_nodes(self.need.labels)
            if entry["NodeID"] not in (*self.ids, node)
        }
        table = placement_group_table().get(group, {}) if group else {}
        for bundle, where in table.get("bundles_to_node_id", {}).items():  # which these workers leave
            for kind, much in table["bundles"][bundle].items() if where in others else ():
                others[where][kind] = others[where].get(kind, 0.0) + much
        return placement.take_room([self.need.amounts] * self.need.count, list(others.values()))


def _named(node: str) -> str:
    """Its host and address, as people know it, and its id."""
    found: dict[str, Any] = next((entry for entry in ray.nodes() if entry["NodeID"] == node), {})
    return f"{found.get('NodeManagerHostname', 'unknown')} ({found.get('NodeManagerAddress', '')}, {node[:12]})"
