"""The metrics of a run beside its judge: computed by actors of their own, or by a trainer between two updates.

A metric that fails costs the run nothing but its numbers. It is said once, and tried again at the next evaluations.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raydistill.config.stages import EvaluationConfig
from raydistill.evaluation.command import WITHIN_S
from raydistill.evaluation.metrics import Metric, metrics_of_run
from raydistill.evaluation.png_scorer import Columns, PngScorer
from raydistill.evaluation.recipes import Recipe, recipe_of
from raydistill.pictures.files import png_bytes
from raydistill.pictures.grids import to_pil
from raydistill.teachers.placement import Need

# all metrics of an evaluation end within command.WITHIN_S: other workers wait for rank 0, and torch gives up after 1800 s
TRIES = 3  # failures in a row after which a metric is left out until the stage starts again

Compute = Callable[[float], Columns]  # with the time by which it must be done, of time.monotonic


class RunScorers:
    """Scores pictures by every metric of `evaluation.metrics` but the judge.

    Args:
        evaluation: section of the configuration.
        device: of the trainer that computes where no actors are asked for; None: this process is no trainer, and
            actors compute in any case.
        failed: is told metric and reason, once a metric.
        scope: of `evaluation.gpus_per_scorer`'s actors: equal ones share them, as a driver and its trainers do.
        within_s: of one call.
    """

    def __init__(
        self,
        evaluation: EvaluationConfig,
        device: torch.device | None,
        failed: Callable[[str, str], None],
        *,
        scope: str = "",
        within_s: float = WITHIN_S,
    ) -> None:
        self.evaluation, self._failed, self._within_s = evaluation, failed, within_s
        self._scope = scope if evaluation.gpus_per_scorer is not None else None
        self._here = device if evaluation.gpus_per_scorer is None else None
        self._metrics = [text for text in evaluation.measured if text != "judge"]
        self._failures = dict.fromkeys(self._metrics, 0)  # in a row
        self._told: set[str] = set()
        self._scorers: dict[str, _Here | _Actor] = {}

    def __call__(self, pictures: torch.Tensor, captions: Sequence[str]) -> Columns:
        """Columns of one number a picture, of the metrics that worked.

        Args:
            pictures: [N, 3, S, S] in [-1, 1].
            captions: N.
        """
        wanted = [metric for metric in self._metrics if self._failures[metric] < TRIES]
        if not wanted:
            return {}
        files, columns = [png_bytes(to_pil(picture), compress_level=1) for picture in pictures], {}
        started = {metric: self._try(metric, lambda m=metric: self._begin(m, files, captions)) for metric in wanted}
        deadline = time.monotonic() + self._within_s
        for metric, compute in started.items():
            if compute is not None:
                columns |= self._try(metric, lambda c=compute: _checked(c(deadline), len(files))) or {}
        return columns

    def fetch(self) -> None:
        """Find or fetch on this node, now and not at the first evaluation, what it needs to compute the metrics."""
        for metric in self._metrics if self._here is not None else ():
            self._try(metric, lambda m=metric: metrics_of_run(self.evaluation, m))

    def start(self) -> None:
        """Begin the actors that others share, so that they last as long as this process."""
        for metric in self._metrics if self._scope is not None else ():
            self._try(metric, lambda m=metric: self._scorers.setdefault(m, self._scorer(m)))

    def close(self) -> None:
        """End the actors that this process has begun."""
        self._scorers.clear()

    def _begin(self, metric: str, files: Sequence[bytes], captions: Sequence[str]) -> Compute:
        """All actors begin before the first is waited for."""
        if metric not in self._scorers:
            self._scorers[metric] = self._scorer(metric)
        return self._scorers[metric].begin(files, captions, self.evaluation.batch_size)

    def _scorer(self, metric: str) -> _Here | _Actor:
        found = metrics_of_run(self.evaluation, metric)[0]
        if self._here is not None:
            return _Here(recipe_of(found, "cpu"), self._here)
        return _Actor(found, metric, self.evaluation, self._scope)

    def _try(self, metric: str, work: Callable[[], Any]) -> Any:
        """What the work gives; None where it failed."""
        try:
            done = work()
        except Exception as error:  # noqa: BLE001 (programs and packages of others have their own)
            lost = isinstance(error, RayError) and not isinstance(error, RayTaskError)
            if lost:  # the next evaluation starts another
                self._scorers.pop(metric, None)
            self._failures[metric] += 1
            if metric not in self._told:
                self._told.add(metric)
                self._failed(metric, _reason(error))
            return None
        if isinstance(done, dict):
            self._failures[metric] = 0
        return done


class _Here:
    """In this process, whose device has the model only while it computes."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.scorer = PngScorer(recipe.make, recipe.arguments)

    def begin(self, files: Sequence[bytes], captions: Sequence[str], batch_size: int) -> Compute:
        return lambda _: self._compute(files, captions, len(files) if self.recipe.at_once else batch_size)

    def _compute(self, files: Sequence[bytes], captions: Sequence[str], at_once: int) -> Columns:
        self.scorer.load()
        try:
            self._make_room()  # what training keeps in reserve
            self.scorer.to(self.device)
            return self.scorer.measure(files, captions, at_once)
        finally:
            self.scorer.to("cpu")
            self._make_room()

    def _make_room(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


class _Actor:
    """In an actor, which is kept: its GPU's memory is its own for as long as whoever began it lasts."""

    def __init__(self, metric: Metric, text: str, evaluation: EvaluationConfig, scope: str | None) -> None:
        gpus = evaluation.gpus_per_scorer or 0.0
        recipe = recipe_of(metric, "cuda" if gpus else "cpu")
        self.at_once = recipe.at_once
        options: dict[str, Any] = {"num_cpus": evaluation.cpus_per_scorer, "num_gpus": gpus, "max_restarts": 0}
        options |= {"label_selector": evaluation.node_labels} if evaluation.node_labels else {}
        options |= {} if scope is None else {"name": f"scorer {scope} {metric.name}", "get_if_exists": True}
        make: Callable[..., Any] = recipe.make
        arguments = recipe.arguments
        if recipe.runtime_env is not None:  # which has no configuration, and gets the paths of this node
            options |= {"runtime_env": recipe.runtime_env}
        else:
            make, arguments = _made_there, {"evaluation": evaluation, "text": text, "device": "cuda" if gpus else "cpu"}
        self.actor: ActorHandle = ray.remote(PngScorer).options(**options).remote(make, arguments)
        self.placed = self.actor.__ray_ready__.remote()

    def begin(self, files: Sequence[bytes], captions: Sequence[str], batch_size: int) -> Compute:
        answer = self.actor.measure.remote(files, list(captions), len(files) if self.at_once else batch_size)

        def compute(deadline: float) -> Columns:
            try:
                left = max(0.0, deadline - time.monotonic())
                ray.get(self.placed, timeout=min(left, WITHIN_S))  # however long the work may take
                return ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError:
                raise TimeoutError(
                    "no answer in time: its actor may find no room (evaluation.gpus_per_scorer, "
                    "evaluation.cpus_per_scorer, evaluation.node_labels), or its environment is being built"
                ) from None

        return compute


def scorer_needs(evaluation: EvaluationConfig) -> list[Need]:
    """The actors of a run's metrics, where it asks for any."""
    count = len([text for text in evaluation.measured if text != "judge"])
    if evaluation.gpus_per_scorer is None or not count:
        return []
    keys = "evaluation.metrics, evaluation.cpus_per_scorer or evaluation.gpus_per_scorer"
    amounts = {"CPU": evaluation.cpus_per_scorer, "GPU": evaluation.gpus_per_scorer}
    return [Need("scorers", count, amounts, keys, evaluation.node_labels)]


def _made_there(evaluation: EvaluationConfig, text: str, device: str) -> Any:
    """The scorer of one metric, with weights of the node where this runs."""
    recipe = recipe_of(metrics_of_run(evaluation, text)[0], device)
    return recipe.make(**recipe.arguments)


def _checked(columns: Columns, count: int) -> Columns:
    """Numbers that are finite, None for others. Raises ValueError where a column has not one for each picture."""
    for name, values in columns.items():
        if len(values) != count:
            raise ValueError(f"{len(values)} values of {name} for {count} pictures")
    return {
        name: [float(value) if value is not None and abs(value) < float("inf") else None for value in values]
        for name, values in columns.items()
    }


def _reason(error: Exception) -> str:
    """In one line: the cause of an error in an actor, which Ray wraps."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:800]
