"""Rank 0's evaluation, logging and export."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from raydistill.config.schema import Config
from raydistill.storage.atomic import read_json, reading, replace_text, writing
from raydistill.tracking.progress import write_progress
from raydistill.workers.stage import Stage


class Observer:
    """Rank 0's evaluation, logging and export."""

    def __init__(self, stage: Stage, config: Config, distiller: Any, tracker: Any, best: float, score: float) -> None:
        from raydistill.data.prompts import held_out_prompts, training_prompts
        from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator

        self.stage, self.config, self.distiller, self.tracker = stage, config, distiller, tracker
        self.best, self.score = best, score
        self.collapse: str | None = None  # the alarm, while it lasts
        self.told_of_cuts = False
        self.started = time.monotonic()
        self.samples = config.distill.batch_size * config.distill.steps
        evaluation, device = config.evaluation, distiller.device

        def evaluator(prompts: Any, count: int, seed: int) -> StudentEvaluator:
            return StudentEvaluator(distiller.student_space, FixedPrompts(prompts, count, seed), evaluation, device)

        self.final = evaluator(held_out_prompts(config), evaluation.count, evaluation.seed)
        # Checkpoints are chosen on training prompts, so that the held-out ones stay unseen.
        self.periodic = evaluator(training_prompts(config), evaluation.periodic_count, evaluation.seed + 1)

    def _evaluate(self, evaluator: Any) -> tuple[torch.Tensor, dict[str, float]]:
        pictures = evaluator.draw(self.distiller.evaluated, self.config.student.start_timestep)
        return pictures, evaluator.accuracy(pictures)

    def before(self) -> None:
        """The start, on the held-out prompts; kept for the summary. Its curves on training prompts begin here too.

        Later students are compared with each other, not with the start, which its owner has: a run exports what it
        trained, and says where that is worse.
        """
        pictures, table = self._evaluate(self.final)
        self._keep("before", pictures, table, 0)
        judged, table = self._look(0)
        self.score = judged or 0.0
        self.tracker.metrics(table, 0)
        self._keep_best(0)  # for a run that collapses before its first evaluation, which is better than this

    def _keep_best(self, step: int) -> None:
        from raydistill.workers.checkpoint import save_state

        with writing(self.stage.path("best")) as folder:
            folder.mkdir(exist_ok=True)
            save_state(folder, self.distiller.best_state(), {"step": step, "score": self.score})

    def _keep(self, name: str, pictures: torch.Tensor, table: dict[str, float], step: int) -> None:
        from raydistill.pictures.files import save_pictures
        from raydistill.pictures.grids import grid

        count = self.config.evaluation.grid
        save_pictures(self.stage.path(f"{name}.safetensors"), pictures[:count])
        replace_text(self.stage.path(f"{name}.json"), json.dumps(table))
        self.tracker.metrics({f"eval/{key}": value for key, value in table.items()}, step)
        self.tracker.image(grid(pictures[:count], self.final.fixed.captions[:count]), "samples", step)

    def catch_up(self, first: int) -> None:
        """Log again what a lost worker may have kept to itself: the tracker leaves out what the run already has."""
        from raydistill.workers.step_log import read_lines, step_file, steps_of

        lines = steps_of(read_lines(step_file(self.stage.path(), 0)))
        self.tracker.catch_up({step: line["values"] for step, line in lines.items() if step <= first})

    def after_step(self, step: int, world: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is time, and log; adds what it measures to `metrics`."""
        seconds = metrics["time/step"]
        metrics["throughput/samples_per_s"] = self.config.distill.workers * self.config.distill.batch_size / seconds
        metrics["throughput/workers"] = world
        if metrics.get("data/cut_prompts") and not self.told_of_cuts:
            self.told_of_cuts = True
            print(
                f"{self.stage.name}: update {step} has prompts that are longer than a text encoder reads; their ends are "
                "lost (data/cut_prompts counts them)",
                flush=True,
            )
        drifted = self.distiller.guard.alarm
        self._alarm(step, drifted)
        if step % self.config.distill.evaluate_every == 0 or step == self.config.distill.steps:
            judged, table = self._look(step)
            metrics |= table
            # without a judge the last student counts as the best, unless its latents have drifted away
            self.score = float(step) if judged is None else judged
            self._guard(step, judged, keep=judged is not None or drifted is None)
        self.tracker.metrics(metrics, step)
        write_progress(
            self.stage.path("progress.json"),
            step=step,
            total=self.config.distill.steps,
            samples_per_s=float(metrics["throughput/samples_per_s"]),
            wait_teacher_s=float(metrics.get("time/wait_teacher", 0.0)),
            score=float(self.score),
        )

    def _look(self, step: int) -> tuple[float | None, dict[str, float]]:
        """(what students are compared by, metrics) of the student on training prompts, whose pictures are logged."""
        from raydistill.pictures.grids import grid

        pictures, table = self._evaluate(self.periodic)
        count = self.config.evaluation.grid
        self.tracker.image(grid(pictures[:count], self.periodic.fixed.captions[:count]), "periodic", step)
        judged = table[self.config.evaluation.metric] if table else None
        return judged, {f"eval/periodic_{key}": value for key, value in table.items()}

    def _alarm(self, step: int, reason: str | None) -> None:
        """Say once that the student collapses, on screen and in the run's tags; None: it does not, or no longer."""
        if reason is not None and self.collapse is None:
            message = f"step {step}: {reason}"
            print(f"collapse alarm: {message}", flush=True)
            self.tracker.tags({"collapse_alarm": message})
        self.collapse = None if reason is None else self.collapse or f"step {step}: {reason}"

    def _guard(self, step: int, judged: float | None, keep: bool) -> None:
        """Alarm where the evaluation falls well below its best; keep the best student."""
        if judged is not None and judged < self.best - 0.1:
            self._alarm(step, f"evaluation fell to {judged:.3f} from {self.best:.3f}")
        if keep and self.score > self.best:
            self.best = self.score
            self._keep_best(step)

    def _card(self, step: int, table: dict[str, float]) -> Any:
        from raydistill.config.reading import config_hash
        from raydistill.export.pipeline import ModelCard

        return ModelCard(
            teacher=self.config.teacher.model,
            teacher_class=self.distiller.teacher_space.pipeline_class,
            student=self.config.student.model,
            steps=step,
            run_id=self.stage.mlflow_run,
            config_hash=config_hash(self.config),
            metrics=table,
            start=self.config.student.unet,
        )

    def finish(self, step: int, stopped: str | None) -> None:
        """Evaluate the best student on the held-out prompts, export it, write the result.

        Args:
            step: updates that were done.
            stopped: the collapse that ended the stage; None: it went to its end.
        """
        from raydistill.export.pipeline import export_student
        from raydistill.workers.checkpoint import CheckpointError, load_state

        unet = self.distiller.evaluated
        try:
            with reading(self.stage.path("best")) as folder:
                state, about = load_state(folder)
        except CheckpointError as error:
            about = {"step": step}
            print(f"{self.stage.name}: {error}; the student of update {step} is exported instead", flush=True)
        else:
            self.distiller.load_best_state(state)
        pictures, table = self._evaluate(self.final)
        self._keep("after", pictures, table, step)
        space = self.distiller.student_space
        card = self._card(about["step"], table)
        with writing(self.stage.path("export")) as folder:
            export_student(space, unet, self.config.student.start_timestep, folder, card)
        self.tracker.artifact(self.stage.path("export"))
        if self.config.bridge.trainable:
            with writing(self.stage.path("bridge")) as folder:
                self.distiller.bridge.save(folder, {"step": about["step"]})
            self.tracker.artifact(self.stage.path("bridge"))
        before = read_json(self.stage.path("before.json"), "restore it, or use another run.name")
        metric = self.config.evaluation.metric
        if table and table[metric] < before[metric]:
            worse = (
                f"eval/{metric} on held-out prompts is {table[metric]:.3f}, and was {before[metric]:.3f} at the start"
            )
            print(f"{self.stage.name}: the student is worse than before: {worse}", flush=True)
            self.tracker.tags({"worse_than_start": worse})
        result = {
            "before": before,
            "after": table,
            "steps": step,
            "best_step": about["step"],
            "stopped": stopped,
        }
        replace_text(self.stage.path("result.json"), json.dumps(result, indent=1))
