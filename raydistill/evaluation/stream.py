"""An evaluation as a Ray Data stream: draw -> judge -> clipscore -> rewards, one batch of pictures a block.

Rows are batch numbers; pictures and scores go through the evaluation's folder, which all nodes must see. Each stage
skips what is there, so a job that was killed goes on where it was, and another metric can be added afterwards without
drawing again. Metrics of a whole set (Fréchet distance, FID) and scorer commands follow when all pictures are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from raydistill.data.ray_data import dataset_of
from raydistill.data.stage_error import StageError
from raydistill.errors import StageFailed
from raydistill.evaluation.parts import Parts, Stage
from raydistill.teachers import placement

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """One stage of the stream, and what its actors need.

    Attributes:
        metric: its name.
        make, arguments: `make(**arguments)` is called in the actor.
        runtime_env: of its own; None: the job's.
        actors, cpus, gpus: how many actors, and the share of each.
    """

    metric: str
    make: Callable[..., Any]
    arguments: dict[str, Any]
    runtime_env: dict[str, Any] | None = None
    actors: int = 1
    cpus: float = 0.25
    gpus: float = 0.0


def run_stages(parts: Parts, stages: list[StagePlan], done: Callable[[int], object] = lambda pictures: None) -> None:
    """Run every stage for every batch that it lacks; `done` is called with the pictures of each finished batch.

    Raises:
        StageFailed: a stage failed.
    """
    missing = {stage.metric: set(parts.missing(stage.metric)) for stage in stages}
    batches = sorted(set().union(*missing.values())) if missing else []
    done(sum(len(parts.rows(b)) for b in parts.batches if b not in set(batches)))
    if not batches:
        return
    stages = [stage for stage in stages if missing[stage.metric]]
    check_room(stages, ray.cluster_resources())
    rows = dataset_of([{"batch": batch} for batch in batches])
    rows.context.raise_original_map_exception = True  # a StageError
    for stage in stages:
        arguments = {"folder": str(parts.folder), "batch_size": parts.batch_size, "metric": stage.metric}
        arguments |= {"make": stage.make, "arguments": stage.arguments}
        more = {"runtime_env": stage.runtime_env} if stage.runtime_env else {}
        rows = rows.map_batches(
            Stage,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=stage.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=stage.cpus,
            num_gpus=stage.gpus,
            **more,
        )
    finished = iter(rows.iter_batches(batch_size=1, batch_format="numpy"))
    try:
        for row in finished:
            done(sum(len(parts.rows(batch)) for batch in row["batch"].tolist()))
    except StageError as error:
        raise _failed(error) from error
    except RayError as error:
        cause = getattr(error, "cause", None)
        raise _failed(cause if isinstance(cause, StageError) else error) from error


def check_room(stages: list[StagePlan], cluster: dict[str, float]) -> None:
    """Raises StageFailed where the actors can never be placed: Ray Data would wait for ever without a word."""
    wanted = {
        "CPU": sum(stage.actors * stage.cpus for stage in stages),
        "GPU": sum(stage.actors * stage.gpus for stage in stages),
    }
    for kind, amount in wanted.items():
        if amount > cluster.get(kind, 0.0) + 1e-6 and not placement.autoscaler_present():
            raise StageFailed(
                f"the stages need {amount:g} {kind} at once, and the cluster has {cluster.get(kind, 0.0):g}: lower --actors "
                "or --gpus, or give the metrics one after the other"
            )


def _failed(error: Exception) -> StageFailed:
    if isinstance(error, StageError):
        log.debug("%s", error.trace)
        return StageFailed(f"{error.text} ({error.kind})")
    return StageFailed(" ".join(str(error).split())[-800:])


def run_once(
    work: Callable[..., Any], *arguments: Any, runtime_env: dict[str, Any] | None = None, gpus: float = 0.0
) -> Any:
    """One Ray task, for example in an environment of its own. Raises StageFailed."""
    options: dict[str, Any] = {"num_cpus": 0.25, "num_gpus": gpus, "max_retries": 0}
    if runtime_env:
        options["runtime_env"] = runtime_env
    try:
        return ray.get(ray.remote(**options)(work).remote(*arguments))
    except RayError as error:
        cause = getattr(error, "cause", None)
        text = f"{cause} ({type(cause).__name__})" if cause is not None else " ".join(str(error).split())[-800:]
        raise StageFailed(text) from error
