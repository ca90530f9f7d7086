"""Whether what a run asks for could ever be placed, on this machine or on a cluster that cannot grow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from ray._private.utils import get_num_cpus  # what `ray.init` counts by itself; there is no public name

from raydistill.config.reading import (
    drawing_config,
    draws_pairs,
    draws_samples,
    needs_pairs,
    other_drawer,
    streams_bridge,
    trains_bridge,
)
from raydistill.config.schema import Config
from raydistill.data.pair_stream import stream_needs
from raydistill.data.pictures import is_stream
from raydistill.data.synthesis_stream import actor_needs
from raydistill.errors import InputError
from raydistill.teachers.placement import ROOM_PATIENCE_S, Need, autoscaler_present, labelled_nodes, lacking
from raydistill.tracking.screen import screen
from raydistill.workers.ray_train import encoder_need, rank_need, worker_need
from raydistill.workers.scorers import scorer_needs

Node = tuple[dict[str, str], dict[str, float]]  # labels and resources

MACHINE = "this machine, which has no cluster (RAY_ADDRESS names none)"  # for messages
CLUSTER = "this cluster, which no autoscaler can add nodes to"


def needs(config: Config, roles: Sequence[str] | None = None) -> Iterator[list[Need]]:
    """For each stage, what must be placed at the same time.

    Args:
        roles: of `planning.memory.ROLES`, those that this job runs; None: all.
    """
    ranks = [] if config.teachers.service else [rank_need(config, config.teachers.replicas)]
    drawers = [rank_need(drawing_config(config), config.teachers.replicas)] if other_drawer(config) else ranks
    alone = roles is not None and streams_bridge(config)  # of a Bridge, whose discriminator is another job's
    if config.bridge.pairs is None and needs_pairs(config) and not alone:
        sampled = draws_pairs(config)
        yield [
            *(drawers if sampled else []),
            *actor_needs(config.synthesis, sampled, streamed=is_stream(config.synthesis)),
        ]
    if roles is None and draws_samples(config):
        yield [*drawers, *actor_needs(config.synthesis, True)]
    beside = stream_needs(config.synthesis, config.distill.fewest) if streams_bridge(config) else []
    if roles is None:
        yield [*ranks, worker_need(config), encoder_need(config), *scorer_needs(config.evaluation)]
        if beside:
            yield [worker_need(config), *beside]
    elif trains_bridge(config) and "Bridge training" in roles:
        yield [worker_need(config), *beside]


def this_machine() -> dict[str, float] | None:
    """What a cluster of our own on this machine would have; None: the job would join another."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    return {"CPU": float(get_num_cpus(True)), "GPU": float(torch.cuda.device_count())}


def check_machine(config: Config, roles: Sequence[str] | None = None) -> None:
    """Raises InputError where this machine is too small for a run that would start a cluster here; starts nothing."""
    if (have := this_machine()) is not None:
        _check(config, roles, [({}, have)], MACHINE)


def check_cluster(config: Config, roles: Sequence[str] | None = None) -> None:
    """The same of the cluster that the job is connected to, with nothing else on it; one that can grow is believed.

    Nodes that are still joining have ROOM_PATIENCE_S for it.
    """
    await_nodes(lambda nodes: _check(config, roles, nodes, CLUSTER))


def await_nodes(check: Callable[[list[Node]], None]) -> None:
    """Ask again until this cluster's nodes pass; one that can grow is believed.

    Args:
        check: raises InputError, which is raised here after ROOM_PATIENCE_S. It is given the nodes with nothing on them.
    """
    deadline, told = time.monotonic() + ROOM_PATIENCE_S, False
    while not autoscaler_present():
        nodes = [(dict(node.get("Labels") or {}), dict(node["Resources"])) for node in labelled_nodes({})]
        try:
            return check(nodes)
        except InputError:
            if time.monotonic() > deadline:
                raise
        if not told:
            screen.say(f"cluster   its {len(nodes)} node(s) are too few: waiting {ROOM_PATIENCE_S:.0f} s for others")
            told = True
        time.sleep(1)


def _check(config: Config, roles: Sequence[str] | None, nodes: list[Node], where: str) -> None:
    for together in needs(config, roles):
        if problem := lacking(together, [(labels, dict(free)) for labels, free in nodes]):
            raise InputError(f"on {where}, {problem}")
