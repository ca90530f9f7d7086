"""What scores pictures for a metric, for whoever runs it: an actor of a stream, an actor of a run, or a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raydistill.errors import InputError
from raydistill.evaluation.command import CommandScorer
from raydistill.evaluation.metrics import Metric
from raydistill.evaluation.rewards import REWARDS, runtime_env


@dataclass(frozen=True)
class Recipe:
    """`make(**arguments)` gives a scorer of picture files.

    Attributes:
        runtime_env: Ray's description of an environment of its own; None: it runs in any process of the project.
        at_once: it gets all pictures in one call, as programs do that load a model each time.
    """

    make: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    runtime_env: dict[str, Any] | None = None
    at_once: bool = False


def recipe_of(metric: Metric, device: str, threads: int | None = None) -> Recipe:
    """Of a metric of single pictures, on a device. Raises InputError for a metric of whole sets."""
    # transformers' CLIP takes a second, which a run without such a metric need not spend
    from raydistill.evaluation.scorers import ClipScorer, JudgeScorer, PickScorer

    weights, common = metric.weights, {"device": device, "threads": threads}
    if metric.command:
        return Recipe(CommandScorer, {"name": metric.name, "words": metric.command}, at_once=True)
    if metric.name == "judge":
        return Recipe(JudgeScorer, {"folder": weights["judge"], "threads": threads})
    if metric.name == "clipscore":
        return Recipe(ClipScorer, {"folder": weights["clipscore"]} | common)
    if metric.name == "pickscore":
        return Recipe(
            PickScorer, {"folder": weights["pickscore"], "processor": weights["pickscore.processor"]} | common
        )
    if metric.name in REWARDS:
        return Recipe(REWARDS[metric.name], {"weights": weights, "device": device}, runtime_env(metric.name))
    raise InputError(f"{metric.name}: scores no single pictures")
