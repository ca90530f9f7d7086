"""An evaluation on Ray: its pictures and scores as a Ray Data stream, then what needs all pictures, then its results.

    batch numbers ──► draw ──► judge ──► clipscore ──► rewards

Pictures and scores go through the evaluation's folder, which all nodes must see. Each actor skips what is there. So a
job that was killed goes on where it was, and another metric can be added afterwards without drawing again. Metrics of
a whole set (Fréchet distance, FID) and scorer commands follow when all pictures are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from raydistill.data.ray_data import dataset_of
from raydistill.data.stage_error import StageError
from raydistill.driver import room
from raydistill.errors import InputError, StageFailed
from raydistill.evaluation.command import run_command
from raydistill.evaluation.evaluation import Evaluation
from raydistill.evaluation.folder import DRAW, PICTURES, BatchActor, EvaluationFolder
from raydistill.evaluation.metrics import SET_METRICS, Metric, pictures_in
from raydistill.evaluation.recipes import recipe_of
from raydistill.evaluation.results import collect, finish
from raydistill.evaluation.rewards import inception_fid, runtime_env
from raydistill.evaluation.scorers import Drawing, judge_frechet
from raydistill.teachers import placement

log = logging.getLogger(__name__)


def run_evaluation(
    evaluation: Evaluation, done: Callable[[int], object] = lambda pictures: None
) -> dict[str, dict[str, float]]:
    """Do what is missing, inside a connection to Ray, and write the results; returns the table of means.

    Raises StageFailed: an actor or a command failed; what is there is kept.
    """
    if evaluation.resources.gpus is None:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        evaluation = replace(evaluation, resources=evaluation.resources.divided(len(evaluation.metrics), gpus))
    folder = EvaluationFolder.create(evaluation.folder, evaluation.pictures, evaluation.settings)
    run_stream(folder, pools_of(evaluation), done)
    for metric in evaluation.metrics:
        if metric.command and folder.missing(metric.name):
            arguments = (str(evaluation.folder), folder.batch_size, metric.name, list(metric.command), str(Path.cwd()))
            run_once(run_command, *arguments, gpus=evaluation.resources.gpus)
    for metric in evaluation.metrics:
        if metric.name in SET_METRICS:
            folder.write_set(metric.name, _of_set(evaluation, folder, metric))
    table, columns = collect(evaluation, folder)
    finish(evaluation, table, columns)
    return table


def _of_set(evaluation: Evaluation, folder: EvaluationFolder, metric: Metric) -> float:
    if metric.name == "fid":
        resources, drawn = evaluation.resources, str(evaluation.folder / PICTURES)
        arguments = (drawn, str(evaluation.reference), metric.weights, resources.device)
        return run_once(inception_fid, *arguments, runtime_env=runtime_env("fid"), gpus=resources.gpus)
    files = [str(folder.file_of(picture)) for picture in folder.pictures]
    reference = [str(file) for file in pictures_in(evaluation.reference)]
    return run_once(judge_frechet, metric.weights["judge"], files, reference, evaluation.resources.threads)


# -- the stream ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """One operator of the stream, and what its actors need."""

    metric: str
    make: Callable[..., Any]  # is called in the actor, with the arguments
    arguments: dict[str, Any]
    runtime_env: dict[str, Any] | None = None  # of its own; None: the job's
    actors: int = 1
    cpus: float = 0.25  # of each
    gpus: float = 0.0


def pools_of(evaluation: Evaluation) -> list[ActorPool]:
    """The stream's actors, those that draw first."""
    resources = evaluation.resources
    common = {"device": resources.device, "threads": resources.threads}
    drawing = {"subject": evaluation.subject, "dtype": resources.dtype} | common
    pools = [ActorPool(metric=DRAW, make=Drawing, arguments=drawing, actors=resources.actors, gpus=resources.gpus)]
    for metric in evaluation.metrics:
        if not metric.command and metric.name not in SET_METRICS:
            recipe = recipe_of(metric, resources.device, resources.threads)
            gpus = 0.0 if metric.name == "judge" else resources.gpus
            pools.append(
                ActorPool(
                    metric=metric.name,
                    make=recipe.make,
                    arguments=recipe.arguments,
                    runtime_env=recipe.runtime_env,
                    gpus=gpus,
                )
            )
    return pools


def run_stream(
    folder: EvaluationFolder, pools: list[ActorPool], done: Callable[[int], object] = lambda pictures: None
) -> None:
    """Run every pool for every batch that it lacks; `done` is called with the pictures of each finished batch.

    Raises:
        InputError: the actors can never be placed; nodes that are still joining are waited for.
        StageFailed: an actor failed.
    """
    missing = {pool.metric: set(folder.missing(pool.metric)) for pool in pools}
    batches = sorted(set().union(*missing.values())) if missing else []
    done(sum(len(folder.batch(b)) for b in folder.batches if b not in set(batches)))
    if not batches:
        return
    pools = [pool for pool in pools if missing[pool.metric]]
    room.await_nodes(lambda nodes: check_room(pools, nodes, room.CLUSTER))
    rows = dataset_of([{"batch": batch} for batch in batches])
    rows.context.raise_original_map_exception = True  # a StageError
    for pool in pools:
        arguments = {"path": str(folder.path), "batch_size": folder.batch_size, "metric": pool.metric}
        arguments |= {"make": pool.make, "arguments": pool.arguments}
        more = {"runtime_env": pool.runtime_env} if pool.runtime_env else {}
        rows = rows.map_batches(
            BatchActor,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **more,
        )
    finished = iter(rows.iter_batches(batch_size=1, batch_format="numpy"))
    try:
        for row in finished:
            done(sum(len(folder.batch(batch)) for batch in row["batch"].tolist()))
    except StageError as error:
        raise _failed(error) from error
    except RayError as error:
        cause = getattr(error, "cause", None)
        raise _failed(cause if isinstance(cause, StageError) else error) from error


def check_room(pools: Sequence[ActorPool], nodes: Sequence[room.Node], where: str) -> None:
    """Raises InputError where the actors can never be placed: Ray Data would wait for ever without a word.

    Args:
        nodes: of the cluster, or this machine, with nothing on them.
        where: for the message.
    """
    needs = [
        placement.Need(
            f"the actors of {pool.metric}",
            pool.actors,
            {"CPU": pool.cpus, "GPU": pool.gpus or 0.0},
            "--actors or --gpus, give the metrics one after the other",
        )
        for pool in pools
    ]
    if problem := placement.lacking(needs, [(labels, dict(free)) for labels, free in nodes]):
        raise InputError(f"on {where}, {problem}")


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
    options |= {"runtime_env": runtime_env} if runtime_env else {}
    try:
        return ray.get(ray.remote(**options)(work).remote(*arguments))
    except RayError as error:
        cause = getattr(error, "cause", None)
        text = f"{cause} ({type(cause).__name__})" if cause is not None else " ".join(str(error).split())[-800:]
        raise StageFailed(text) from error
