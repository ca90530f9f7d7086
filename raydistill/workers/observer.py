"""Rank 0's eyes: evaluates the student while it learns, keeps and exports the best, raises the collapse alarm, logs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from raydistill.config.schema import Config
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import held_out_prompts, training_prompts
from raydistill.distillation.updates import Distiller
from raydistill.evaluation.consistency import Consistency, TeacherDecoder
from raydistill.evaluation.evaluator import FixedPrompts, Measured, StudentEvaluator
from raydistill.evaluation.score_pictures import ScorePictures
from raydistill.pictures.files import save_pictures
from raydistill.pictures.grids import grid
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning
from raydistill.storage.atomic import read_json, replace_text
from raydistill.storage.resolve import resolve
from raydistill.tracking.progress import write_progress
from raydistill.tracking.tracker import Tracker
from raydistill.workers.alarms import Alarms
from raydistill.workers.best import BestStudent
from raydistill.workers.scorers import RunScorers
from raydistill.workers.stage import Stage, Standing
from raydistill.workers.step_log import read_lines, step_file, steps_of

FIRST = "0-overview"
SHOWN_LOSSES = ("loss/vsd", "loss/gan", "loss/fake")  # on the screen
CONSISTENCY = "bridge/consistency_psnr"


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether the student is evaluated after this update."""
    return step % config.distill.evaluate_every == 0 or step == config.distill.steps


Evaluated = tuple[FixedPrompts, PromptTable]


def evaluated_sets(config: Config, device: torch.device) -> tuple[Evaluated, Evaluated]:
    """(held-out prompts of start and end, training prompts of the periodic evaluation), with the student's conditioning.

    Checkpoints are chosen on training prompts, so that the held-out ones stay unseen. The text encoders run in float32,
    as for the student's training prompts. They are loaded once and dropped, so call it while the device is empty.

    Args:
        device: of the text encoders; where they find no room there, the CPU does their work, and it is said.
    """
    evaluation, space = config.evaluation, load_space(resolve(config.student.model))
    held_out = FixedPrompts(held_out_prompts(config), evaluation.count, evaluation.seed)
    periodic = FixedPrompts(training_prompts(config), evaluation.periodic_count, evaluation.seed + 1)

    def encoded(device: torch.device) -> tuple[Evaluated, Evaluated]:
        text = space.load_text(torch.float32).to(device)
        held_out_table, periodic_table = (
            PromptTable(space, fixed.captions, device=device, text=text) for fixed in (held_out, periodic)
        )
        return (held_out, held_out_table), (periodic, periodic_table)

    try:
        return encoded(device)
    except torch.OutOfMemoryError:
        print(
            "evaluation: the student's text encoders have no room on the GPU; the CPU encodes its prompts", flush=True
        )
    return encoded(torch.device("cpu"))


class Observer:
    """Evaluates, keeps the best student, and logs; changes no number of the training."""

    def __init__(
        self,
        stage: Stage,
        config: Config,
        distiller: Distiller,
        tracker: Tracker,
        standing: Standing,
        *,
        evaluated: Sequence[Evaluated] | None = None,
        shown: tuple[FixedPrompts, Conditioning] | None = None,
    ) -> None:
        """
        Args:
            evaluated: as `evaluated_sets` gives them; None: they are made here, on the CPU.
            shown: prompts of the periodic evaluation and the teacher's conditioning of them, for `ScorePictures`.
        """
        self.stage, self.config, self.distiller = stage, config, distiller
        self.tracker, self.standing = tracker, standing
        self.best = BestStudent(stage, config, distiller.networks)
        self.alarms = Alarms(stage.name, config, tracker, standing)
        self._measured: dict[str, float] = {}  # the last value of evaluation.metric, named with its step
        evaluation, networks = config.evaluation, distiller.networks
        scope = next(iter(stage.runs), None) or ""
        self.scorers = RunScorers(evaluation, networks.device, self._tell_of_failure, scope=scope)
        self.scorers.fetch()

        self.final, self.periodic = (
            StudentEvaluator(networks.student_space, fixed, evaluation, networks.device, self.scorers, table=table)
            for fixed, table in evaluated or evaluated_sets(config, torch.device("cpu"))
        )

        decoder = TeacherDecoder(networks.teacher_space, networks.device)
        self.consistency = Consistency(
            networks, self.periodic, decoder, min(evaluation.consistency_count, evaluation.periodic_count)
        )
        self.score_pictures = None
        if shown is not None:
            fixed, teacher = shown
            student = self.periodic.table(fixed.captions)
            self.score_pictures = ScorePictures(config, networks, fixed, decoder, student=student, teacher=teacher)

    def _evaluate(self, evaluator: StudentEvaluator) -> tuple[torch.Tensor, Measured]:
        student = self.config.student
        pictures = evaluator.draw(self.distiller.networks.evaluated, student.start_timestep, student.steps)
        return pictures, evaluator.measured(pictures)

    def _tell_of_failure(self, metric: str, reason: str) -> None:
        print(f"{self.stage.name}: metric {metric} failed, and the run goes on without it: {reason}", flush=True)
        self.tracker.tags({f"metric_failed.{metric.partition('=')[0].replace(':', '.')}": reason})

    # -- at the start --------------------------------------------------------------------------------
    def before(self) -> None:
        """The start, on the held-out prompts; kept for the summary. Its curves on training prompts begin here too.

        Later students are compared with each other, not with the start, which its owner has: a run exports what it
        trained, and says where that is worse.
        """
        started = time.monotonic()
        self._final_evaluation("before", 0)
        self.standing.final_s = time.monotonic() - started
        measured = self._periodic_evaluation(0)
        self.standing.score = measured.table.get(self.config.evaluation.metric, 0.0)
        named = _named(measured) | self._consistency(0)
        self.tracker.metrics(named | self._headline(named), 0)
        # for a run that collapses before its first evaluation, which is better than this
        self.best.keep(0, self.standing.score)

    def catch_up(self) -> None:
        """Log again what a lost worker may have kept to itself: the tracker leaves out what the run already has."""
        lines = steps_of(read_lines(step_file(self.stage.path(), 0)))
        self.tracker.catch_up({step: line["values"] for step, line in lines.items() if step <= self.standing.step})

    # -- after every update --------------------------------------------------------------------------
    def after_step(self, step: int, world: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is time, and log; adds what it measures to `metrics`."""
        distill = self.config.distill
        metrics["throughput/samples_per_s"] = distill.workers * distill.batch_size / metrics["time/step"]
        metrics["throughput/workers"] = world
        self.alarms.cuts(step, metrics)
        drifted = self.distiller.alarm.reason
        self.alarms.collapse(step, drifted)
        if evaluation_is_due(self.config, step):
            measured = self._periodic_evaluation(step)
            metrics |= _named(measured) | self._consistency(step)
            self._compare(step, measured, drifted)
        metrics |= self._headline(metrics)
        self.tracker.metrics(metrics, step)
        shown = {name.removeprefix("loss/"): float(metrics[name]) for name in SHOWN_LOSSES if name in metrics}
        shown |= {"samples/s": float(metrics["throughput/samples_per_s"])}
        shown |= {"wait_s": float(metrics["time/wait_teacher"])} if "time/wait_teacher" in metrics else {}
        write_progress(
            self.stage.path("progress.json"),
            step=step,
            total=distill.steps,
            tail_s=self.standing.final_s,
            **self._measured | shown,
        )

    def _headline(self, metrics: dict[str, float]) -> dict[str, float]:
        """The loss and the metric again, in a section that MLflow, which sorts by name, shows first."""
        loss = next((metrics[name] for name in SHOWN_LOSSES if name in metrics), None)
        number = metrics.get(f"eval/periodic_{self.config.evaluation.metric}")
        return {f"{FIRST}/{name}": value for name, value in (("loss", loss), ("score", number)) if value is not None}

    def _compare(self, step: int, measured: Measured, drifted: str | None) -> None:
        """Alarm where the evaluation falls well below its best, notice a plateau; keep the best student.

        Without a metric the last student counts as the best, unless its latents have drifted away. So it does where
        the metric has failed at all evaluations so far; one that fails later leaves the best as it is.
        """
        standing, metric = self.standing, self.config.evaluation.metric
        value = measured.table.get(metric)
        if value is None and self.config.evaluation.measured:
            if standing.best == float("-inf") and drifted is None:
                self.best.keep(step, standing.score)
            return
        standing.score = float(step) if value is None else value
        if value is not None:
            self.alarms.fall(step, value, measured.spread[metric])
            self.alarms.plateau(step, measured.each[metric])
        if (value is not None or drifted is None) and standing.score > standing.best:
            standing.best = standing.score
            self.best.keep(step, standing.score)

    def show_scores(self, step: int, latents: Sequence[torch.Tensor]) -> None:
        """Log what the student drew and what the scores made of it: [N, C, H, W] of each row of `ScorePictures.picture`."""
        self.tracker.image(self.score_pictures.picture(latents, step), "scores", step)

    # -- evaluations ---------------------------------------------------------------------------------
    def _periodic_evaluation(self, step: int) -> Measured:
        """Of the student on training prompts; its pictures are logged."""
        pictures, measured = self._evaluate(self.periodic)
        count = self.config.evaluation.grid
        self.tracker.image(grid(pictures[:count], self.periodic.fixed.captions[:count]), "periodic", step)
        metric = self.config.evaluation.metric
        value = measured.table.get(metric)
        self._measured = {} if value is None else {f"{metric}@{step}": value}
        return measured

    def _consistency(self, step: int) -> dict[str, float]:
        """How much the student's picture is the one that the teacher sees; said once where that falls far."""
        if not self.consistency.fixed.captions:
            return {}
        student = self.config.student
        found = self.consistency.psnr(student.start_timestep, student.steps)
        self.alarms.consistency(step, found)
        return {CONSISTENCY: found}

    def _final_evaluation(self, name: str, step: int) -> dict[str, float]:
        """The table of the student on held-out prompts; pictures and table are kept as `name` and logged."""
        pictures, measured = self._evaluate(self.final)
        table = measured.table
        count = self.config.evaluation.grid
        save_pictures(self.stage.path(f"{name}.safetensors"), pictures[:count])
        replace_text(self.stage.path(f"{name}.json"), json.dumps(table))
        self.tracker.metrics({f"eval/{key}": value for key, value in table.items()}, step)
        self.tracker.image(grid(pictures[:count], self.final.fixed.captions[:count]), "samples", step)
        return table

    # -- at the end ----------------------------------------------------------------------------------
    def finish(self) -> None:
        """Evaluate the best student on the held-out prompts, export it, write the result."""
        standing = self.standing
        best_step = self.best.restore(standing.step)
        table = self._final_evaluation("after", standing.step)
        for folder in self.best.export(best_step, table):
            if (self.stage.name, folder.name) != ("distill", "export"):  # which the driver logs as a model
                self.tracker.artifact(folder)
        before = read_json(self.stage.path("before.json"), "restore it, or use another run.name")
        self._compare_with_start(table, before)
        result = {
            "before": before,
            "after": table,
            "steps": standing.step,
            "best_step": best_step,
            "stopped": standing.ended(self.config.distill),
        }
        replace_text(self.stage.path("result.json"), json.dumps(result, indent=1))

    def _compare_with_start(self, table: dict[str, Any], before: dict[str, Any]) -> None:
        """Say where the student has become worse."""
        metric = self.config.evaluation.metric
        if metric in table and metric in before and table[metric] < before[metric]:
            worse = (
                f"eval/{metric} on held-out prompts is {table[metric]:.3f}, and was {before[metric]:.3f} at the start"
            )
            print(f"{self.stage.name}: the student is worse than before: {worse}", flush=True)
            self.tracker.tags({"worse_than_start": worse})

    def close(self) -> None:
        self.scorers.close()


def _named(measured: Measured) -> dict[str, float]:
    return {f"eval/periodic_{key}": value for key, value in measured.table.items()}
