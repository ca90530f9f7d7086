"""Weights of a run's metrics and of its reward on every node that may need them, before a GPU is held anywhere.

A node without a shared cache of the hub fetches gigabytes. In the middle of an evaluation all trainers would wait for them.
"""

from __future__ import annotations

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.errors import InputError, reason
from raydistill.evaluation.metrics import metrics_of_run, reward_places
from raydistill.evaluation.rewards import WEIGHTS
from raydistill.teachers.placement import labelled_nodes
from raydistill.tracking.screen import screen
from raydistill.workers.ray_train import worker_need
from raydistill.workers.scorers import scorer_needs

SOON_S = 10.0  # after which the screen says what is waited for


def fetch_weights(config: Config) -> None:
    """Have each node of the cluster that could hold a trainer, or an actor of a metric, find or fetch the weights.

    Nodes that join later do so when a trainer begins there (`workers.observer`).

    Raises:
        InputError: a node has no weights and cannot get them; names each, and what to do.
    """
    if not any(text in WEIGHTS for text in config.evaluation.measured) and not config.reward.is_on:
        return
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in _nodes(config)}
    tasks = {_found.options(scheduling_strategy=_at(node)).remote(config.model_dump()): node for node in nodes}
    done, left = ray.wait(list(tasks), num_returns=len(tasks), timeout=SOON_S) if tasks else ([], [])
    if left:
        names = ", ".join(sorted({nodes[tasks[task]] for task in left}))
        screen.say(f"metrics   weights are fetched on {len(left)} node(s): {names}")
    wrong = []
    for task in [*done, *left]:
        try:
            problem = ray.get(task)
        except RayTaskError as error:
            problem = reason(error.cause or error)
        except RayError:  # the node is gone, and needs none
            continue
        if problem is not None:
            wrong.append(f"node {nodes[tasks[task]]}: {problem}")
    if wrong:
        raise InputError("\n".join(wrong))


def _nodes(config: Config) -> list[dict]:
    """Entries of `ray.nodes()` on which a trainer that computes metrics, or an actor of one, has room."""
    alone = config.evaluation.gpus_per_scorer is not None
    needs = [*(scorer_needs(config.evaluation) if alone else []), *([worker_need(config)] if _trainers(config) else [])]
    return [
        node
        for need in needs
        for node in labelled_nodes(need.labels)
        if all(node["Resources"].get(kind, 0) >= much - 1e-6 for kind, much in need.amounts.items())
    ]


def _trainers(config: Config) -> bool:
    """Whether trainers themselves need weights."""
    return config.reward.is_on or config.evaluation.gpus_per_scorer is None


def _at(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


@ray.remote(num_cpus=0)
def _found(settings: dict) -> str | None:
    """Why this node has no weights, or None."""
    config = validate(settings)
    try:
        for text in (text for text in config.evaluation.measured if text in WEIGHTS):
            metrics_of_run(config.evaluation, text)
        if _trainers(config):
            reward_places(config)
    except (InputError, OSError) as error:
        return str(error)
    return None
